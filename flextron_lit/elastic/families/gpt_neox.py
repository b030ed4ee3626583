"""GPT-NeoX (Pythia): queries, keys and values fused head by head, biases, an ungated MLP, partly rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXAttention,
    GPTNeoXForCausalLM,
    GPTNeoXMLP,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.families.attention import ElasticAttention, Width, linear_out
from flextron_lit.elastic.families.base import BlockLayout, Family
from flextron_lit.elastic.families.mlp import LinearMLP
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import linear_rows


class ElasticGPTNeoXMLP(LinearMLP, GPTNeoXMLP):
    """MLP without a gate that uses its first neurons only."""

    inner = ("dense_h_to_4h",)
    outer = "dense_4h_to_h"

    def _activate(self, *projected: Tensor) -> Tensor:
        (hidden,) = projected
        activated: Tensor = self.act(hidden)
        return activated


class ElasticGPTNeoXAttention(ElasticAttention, GPTNeoXAttention):
    """Multi-head attention that uses its first heads only; a KV group is one head."""

    eager = staticmethod(eager_attention_forward)
    rotate = staticmethod(apply_rotary_pos_emb)

    @property
    def head_dim(self) -> int:
        """Rows of a head."""
        return int(self.head_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to ([B, T, D], attention weights or None)."""
        width = self.elastic.width(hidden_states)
        if width == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states, attention_mask, layer_past, position_embeddings, **kwargs)
        return self.at_width(hidden_states, width, attention_mask, layer_past, position_embeddings, **kwargs)

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        fused: nn.Linear = self.query_key_value
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        if not isinstance(width, TokenGroups):
            # the three parts of a head lie together, so those of the first heads are one prefix
            states = linear_rows(fused, hidden_states, 3 * width * self.head_dim)
            query, key, value = states.view(*heads[:-1], 3 * self.head_dim).transpose(1, 2).chunk(3, -1)
            return query, key, value
        query_weight, rest_weight = self._parts(fused.weight)
        query_bias, rest_bias = (None, None) if fused.bias is None else self._parts(fused.bias)
        weights = width.split(query_weight, 0)
        biases = len(weights) * (None,) if query_bias is None else width.split(query_bias, 0)
        query = width.spread(hidden_states, lambda own, band: _by_head(own, weights[band], biases[band]))
        keys_values = _by_head(hidden_states, rest_weight, rest_bias).view(*heads[:-1], 2 * self.head_dim)
        key, value = keys_values.transpose(1, 2).chunk(2, -1)
        return query.view(heads).transpose(1, 2), key, value

    def _parts(self, fused: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the fused weight or bias: [H, head_dim, ...] for queries, [H, 2 x head_dim, ...] for the rest."""
        query, rest = fused.unflatten(0, (-1, 3 * self.head_dim)).split([self.head_dim, 2 * self.head_dim], 1)
        return query, rest

    def _projected(self, heads: Tensor, width: Width) -> Tensor:
        return linear_out(self.dense, heads, width, self.head_dim)


def _by_head(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose heads lie apart in memory, one product each and no copy of them (ours).

    At one token 0.7 to 0.8 of the time that it takes to lay them side by side first, at many the same.

    Args:
        inputs: [..., D].
        weight: [H, rows of a head, D].
        bias: [H, rows of a head].

    Returns:
        [..., H x rows of a head].
    """
    tokens = inputs.flatten(0, -2).expand(len(weight), -1, -1)
    outputs = torch.bmm(tokens, weight.mT) if bias is None else torch.baddbmm(bias[:, None], tokens, weight.mT)
    return outputs.movedim(0, 1).reshape(*inputs.shape[:-1], -1)


def _uniform_config(config: PreTrainedConfig, heads: int, neurons: int) -> dict[str, Any] | None:
    # the class derives the size of a head from their number
    return {"intermediate_size": neurons} if heads == config.num_attention_heads else None


GPT_NEOX = Family(
    model=GPTNeoXForCausalLM,
    layers="gpt_neox.layers",
    blocks={
        "attention": BlockLayout(
            path="attention",
            stock=GPTNeoXAttention,
            elastic=ElasticGPTNeoXAttention,
            full_width=lambda config: config.num_attention_heads,
            axes=(
                Axis("query_key_value.weight", 0),
                Axis("query_key_value.bias", 0),
                Axis("dense.weight", 1),
            ),
            shared=frozenset({"dense.bias"}),
            projections=dict.fromkeys(("query_key_value", "dense"), nn.Linear),
            output="dense",
        ),
        "mlp": BlockLayout(
            path="mlp",
            stock=GPTNeoXMLP,
            elastic=ElasticGPTNeoXMLP,
            full_width=lambda config: config.intermediate_size,
            axes=(Axis("dense_h_to_4h.weight", 0), Axis("dense_h_to_4h.bias", 0), Axis("dense_4h_to_h.weight", 1)),
            shared=frozenset({"dense_4h_to_h.bias"}),
            projections=dict.fromkeys(("dense_h_to_4h", "dense_4h_to_h"), nn.Linear),
            output="dense_4h_to_h",
        ),
    },
    uniform_config=_uniform_config,
)
