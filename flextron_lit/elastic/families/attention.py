"""What the elastic attention of all families has in common; how each projects to its heads is its own."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flextron_lit.elastic.adapters import bias_of
from flextron_lit.elastic.families.base import ElasticModule
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import band_columns
from flextron_lit.elastic.remote_code.flextron_layers import pass_over

Width = int | TokenGroups
"""KV groups in use: one number, or a width for every token."""


class ElasticAttention(ElasticModule):
    """Attention that uses its first KV groups only, each with its query heads (paper: heads; groups are ours).

    The unit is the group, so that every sub-network is again a valid GQA model; here it is one head, as in multi-head
    attention. At full width the stock forward runs.
    """

    norm = "input_layernorm"
    config: Any
    layer_idx: int
    head_dim: int
    scaling: Any
    attention_dropout: float
    eager: ClassVar[Any]
    """The family's attention function for the implementation of that name."""
    rotate: ClassVar[Any]
    """What turns queries and keys by their positions, in families that do so."""
    cache: ClassVar[str] = "past_key_values"
    """What the stock forward calls the KV cache."""
    sliding_window: int | None = None
    """How many tokens a token attends to, itself the last of them; None means all before it."""

    @staticmethod
    def full_width(config: PreTrainedConfig) -> int:
        """Its KV groups."""
        return int(config.num_attention_heads)

    @property
    def query_rows(self) -> int:
        """Rows of the queries of one KV group."""
        return self.head_dim

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """[B, T, D] to ([B, T, D], attention weights or None); the rest is as the stock forward takes it, by name."""
        width = self.elastic.width(hidden_states)
        if width == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states, *args, **kwargs)
        self.refuse_foreign()
        return self._at_width(hidden_states, width, *args, **kwargs)

    def _at_width(
        self,
        hidden_states: Tensor,
        width: Width,
        *,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward`, for any width but the full one.

        Where tokens have widths of their own, keys and values are those of all groups for all tokens. So what a token
        gets from its past does not depend on how wide the past was, with a KV cache or without (ours).
        """
        cache = kwargs.pop(self.cache, None)
        if width == 0:
            # no keys and values either: what is skipped costs no memory of the KV cache (see `check_skips`)
            pass_over(cache, self.layer_idx, hidden_states)
            return torch.zeros_like(hidden_states), None
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (each.view(heads).transpose(1, 2) for each in self._heads(hidden_states, width))
        if position_embeddings is not None:
            query, key = self._placed(query, key, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if isinstance(width, TokenGroups):
            # only now: a token that skips still leaves keys and values for those after it
            if not width.bands:
                return torch.zeros_like(hidden_states), None
            key, value = key[:, : width.units], value[:, : width.units]
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self._projected(output.reshape(*hidden_states.shape[:-1], -1), width), weights

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, D] to queries [B, T, H x head_dim], and keys and values [B, T, groups x head_dim].

        For token groups, queries are as wide as the widest token, keys and values those of all groups.
        """
        raise NotImplementedError

    def _placed(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys [B, H or groups, T, head_dim] that know their positions."""
        query, key = self.rotate(query, key, *position_embeddings)
        return query, key

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[B, H, T, head_dim] to ([B, T, H, head_dim], attention weights or None)."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        if self.sliding_window is not None:
            kwargs["sliding_window"] = self.sliding_window
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _projected(self, heads: Tensor, width: Width) -> Tensor:
        """What the heads read, [B, T, H x head_dim], to [B, T, D]."""
        outer, rows = getattr(self, self.outer), self.query_rows
        if not isinstance(width, TokenGroups):
            return self.read(heads, width)
        if not self.compensation.empty:
            return width.each_width(heads, lambda own, i: own[..., width.bands[i].columns(rows)], self.read)
        last = band_columns(outer, width, rows)
        return width.add_up(heads, lambda own, i: last(own[..., width.bands[i].columns(rows)], i), bias_of(outer))
