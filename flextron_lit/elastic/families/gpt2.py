"""GPT-2: one fused projection for queries, keys and values, biases everywhere, an ungated MLP, learned positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2LMHeadModel, eager_attention_forward
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.families.base import BlockHandle, BlockLayout, Family
from flextron_lit.elastic.grouped_mm import fits, grouped_mlp
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import conv1d_bands, conv1d_columns, conv1d_rows


class ElasticGPT2MLP(GPT2MLP):
    """MLP without a gate that uses its first neurons only (paper, elastic MLP)."""

    elastic: BlockHandle

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]  # the stock annotation is wrong
        """[B, T, D] to [B, T, D]."""
        width = self.elastic.width(hidden_states)
        if isinstance(width, TokenGroups):
            return self.dropout(self._grouped(hidden_states, width))
        if width == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states)
        if width == 0:
            return torch.zeros_like(hidden_states)
        hidden = self.act(conv1d_columns(self.c_fc, hidden_states, 0, width))  # [B, T, F]
        return self.dropout(conv1d_rows(self.c_proj, hidden))

    def _grouped(self, hidden_states: Tensor, groups: TokenGroups) -> Tensor:
        """Every token with its own width."""
        if not groups.bands:
            return torch.zeros_like(hidden_states)
        if fits(groups, hidden_states):
            first, last = self.c_fc, self.c_proj
            return grouped_mlp(groups, hidden_states, [(first.weight, first.bias)], self.act, last.weight, last.bias)
        inner = conv1d_bands(self.c_fc, groups)
        outer = groups.split(self.c_proj.weight, 0)

        def part(rows: Tensor, band: int) -> Tensor:
            return self.act(F.linear(rows, *inner[band])) @ outer[band]

        return groups.add_up(hidden_states, part, self.c_proj.bias)


class ElasticGPT2Attention(GPT2Attention):
    """Multi-head attention that uses its first heads only (paper, elastic attention); a KV group is one head."""

    elastic: BlockHandle

    def forward(  # type: ignore[override]  # the stock signature also serves cross-attention, which is not elastic
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to ([B, T, D], attention weights or None)."""
        groups = self.elastic.width(hidden_states)
        if isinstance(groups, TokenGroups):
            return self._grouped(hidden_states, groups, past_key_values, attention_mask, **kwargs)
        if groups == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states, past_key_values, attention_mask, **kwargs)
        if groups == 0:
            return torch.zeros_like(hidden_states), None
        shape = hidden_states.shape[:-1]  # B, T
        rows = groups * self.head_dim
        # the segments of q, k and v lie apart in the fused weight, so a prefix of each is a view of its own
        query, key, value = (
            conv1d_columns(self.c_attn, hidden_states, start, rows).view(*shape, groups, self.head_dim).transpose(1, 2)
            for start in (0, self.split_size, 2 * self.split_size)
        )  # [B, groups, T, head_dim]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        projected = conv1d_rows(self.c_proj, output.reshape(*shape, rows))
        return self.resid_dropout(projected), weights

    def _grouped(
        self,
        hidden_states: Tensor,
        groups: TokenGroups,
        past_key_values: Cache | None,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and output of every token with its own width; keys and values of all heads for all tokens (ours)."""
        shape = hidden_states.shape[:-1]  # B, T
        heads = (*shape, -1, self.head_dim)
        queries = conv1d_bands(self.c_attn, groups, self.head_dim, self.split_size)
        query = groups.spread(hidden_states, lambda own, band: F.linear(own, *queries[band]))
        query = query.view(heads).transpose(1, 2)
        keys_values = conv1d_columns(self.c_attn, hidden_states, self.split_size, 2 * self.split_size)
        key, value = (each.view(heads).transpose(1, 2) for each in keys_values.chunk(2, -1))  # [B, H, T, head_dim]
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if not groups.bands:
            return torch.zeros_like(hidden_states), None
        used = groups.units
        output, weights = self._attend(query, key[:, :used], value[:, :used], attention_mask, **kwargs)
        outs = groups.split(self.c_proj.weight, 0, self.head_dim)

        def part(own: Tensor, band: int) -> Tensor:
            return own[..., groups.bands[band].columns(self.head_dim)] @ outs[band]

        return self.resid_dropout(groups.add_up(output.reshape(*shape, -1), part, self.c_proj.bias)), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        implementation = self.config._attn_implementation
        if implementation == "eager" and self.reorder_and_upcast_attn:
            return self._upcast_and_reordered_attn(query, key, value, attention_mask)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        dropout = self.attn_dropout.p if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)


def _neurons(config: PreTrainedConfig) -> int:
    return int(config.n_inner or 4 * config.hidden_size)


def _narrow_attention(attention: Any, groups: int) -> None:
    attention.num_heads = groups
    attention.split_size = groups * attention.head_dim


def _uniform_config(config: PreTrainedConfig, heads: int, neurons: int) -> dict[str, Any] | None:
    # the class derives the size of a head from their number
    return {"n_inner": neurons} if heads == config.num_attention_heads else None


GPT2 = Family(
    model=GPT2LMHeadModel,
    layers="transformer.h",
    blocks={
        "attention": BlockLayout(
            path="attn",
            stock=GPT2Attention,
            elastic=ElasticGPT2Attention,
            full_width=lambda config: config.num_attention_heads,
            axes=(
                Axis("c_attn.weight", 1, parts=3),
                Axis("c_attn.bias", 0, parts=3),
                Axis("c_proj.weight", 0),
            ),
            shared=frozenset({"c_proj.bias"}),
            projections=dict.fromkeys(("c_attn", "c_proj"), Conv1D),
            output="c_proj",
            narrow=_narrow_attention,
        ),
        "mlp": BlockLayout(
            path="mlp",
            stock=GPT2MLP,
            elastic=ElasticGPT2MLP,
            full_width=_neurons,
            axes=(Axis("c_fc.weight", 1), Axis("c_fc.bias", 0), Axis("c_proj.weight", 0)),
            shared=frozenset({"c_proj.bias"}),
            projections=dict.fromkeys(("c_fc", "c_proj"), Conv1D),
            output="c_proj",
        ),
    },
    uniform_config=_uniform_config,
)
