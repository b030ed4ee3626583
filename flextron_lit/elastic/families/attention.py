"""What the elastic attention of all families has in common; how each projects to its heads and back is its own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flextron_lit.elastic.families.base import BlockHandle
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import linear_columns

Width = int | TokenGroups
"""KV groups in use: one number, or a width for every token."""


class ElasticAttention(nn.Module):
    """Attention that uses its first KV groups only, each with its query heads (paper: heads; groups are ours).

    The unit is the group, so that every sub-network is again a valid GQA model. A family's class has this one and the
    stock class as its bases; its `forward` leaves the full width to the stock one and all others to `at_width`.
    """

    elastic: BlockHandle
    config: Any
    layer_idx: int
    scaling: Any
    attention_dropout: float
    eager: ClassVar[Any]
    """The family's attention function for the implementation of that name."""
    rotate: ClassVar[Any]
    """What turns queries and keys by their positions, in families that do so."""

    @property
    def window(self) -> int | None:
        """How many tokens a token attends to, itself the last of them; None means all before it."""
        return None

    def at_width(
        self,
        hidden_states: Tensor,
        width: Width,
        attention_mask: Tensor | None,
        cache: Cache | None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to ([B, T, D], attention weights or None), for any width but the full one.

        Where tokens have widths of their own, keys and values are those of all groups for all tokens. So what a token
        gets from its past does not depend on how wide the past was, with a KV cache or without (ours).
        """
        if width == 0:
            return torch.zeros_like(hidden_states), None
        query, key, value = self._heads(hidden_states, width)
        if position_embeddings is not None:
            query, key = self._placed(query, key, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if isinstance(width, TokenGroups):
            if not width.bands:
                return torch.zeros_like(hidden_states), None
            key, value = key[:, : width.units], value[:, : width.units]
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self._projected(output.reshape(*hidden_states.shape[:-1], -1), width), weights

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] to queries [B, H, T, head_dim], and keys and values [B, groups, T, head_dim].

        For token groups, queries are as wide as the widest token, keys and values those of all groups.
        """
        raise NotImplementedError

    def _placed(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys that know their positions, in the shapes of `_heads`."""
        query, key = self.rotate(query, key, *position_embeddings)
        return query, key

    def _projected(self, heads: Tensor, width: Width) -> Tensor:
        """What the heads read, [B, T, H x head_dim], to [B, T, D]."""
        raise NotImplementedError

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, H, T, head_dim] to ([B, T, H, head_dim], attention weights or None)."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        if self.window is not None:
            kwargs["sliding_window"] = self.window
        dropout = self._dropout() if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _dropout(self) -> float:
        """Probability that an attention weight is dropped in training."""
        return self.attention_dropout


def linear_out(linear: nn.Linear, heads: Tensor, width: Width, rows: int) -> Tensor:
    """The output projection of heads [B, T, units x rows of a unit] to [B, T, D], for a width that is not full."""
    if not isinstance(width, TokenGroups):
        return linear_columns(linear, heads)
    outs = width.split(linear.weight, 1, rows)

    def part(own: Tensor, band: int) -> Tensor:
        return F.linear(own[..., width.bands[band].columns(rows)], outs[band])

    return width.add_up(heads, part, linear.bias)
