"""Llama: separate projections, gated MLP, rotary positions, grouped-query or multi-head attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.families.base import BlockHandle, BlockLayout, Family
from flextron_lit.elastic.grouped_mm import fits, grouped_mlp
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import linear_bands, linear_columns, linear_rows


class ElasticLlamaMLP(LlamaMLP):
    """Gated MLP that uses its first neurons only (paper, elastic MLP)."""

    elastic: BlockHandle

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        width = self.elastic.width(x)
        if isinstance(width, TokenGroups):
            return self._grouped(x, width)
        if width == self.elastic.full:
            return super().forward(x)
        if width == 0:
            return torch.zeros_like(x)
        hidden = self.act_fn(linear_rows(self.gate_proj, x, width)) * linear_rows(self.up_proj, x, width)  # [B, T, F]
        return linear_columns(self.down_proj, hidden)

    def _grouped(self, x: Tensor, groups: TokenGroups) -> Tensor:
        """Every token with its own width."""
        if not groups.bands:
            return torch.zeros_like(x)
        if fits(groups, x):
            inner = [(linear.weight.t(), linear.bias) for linear in (self.gate_proj, self.up_proj)]
            outer = self.down_proj
            return grouped_mlp(groups, x, inner, self._activate, outer.weight.t(), outer.bias)
        gates, ups = linear_bands(self.gate_proj, groups), linear_bands(self.up_proj, groups)
        downs = groups.split(self.down_proj.weight, 1)

        def part(rows: Tensor, band: int) -> Tensor:
            return F.linear(self._activate(F.linear(rows, *gates[band]), F.linear(rows, *ups[band])), downs[band])

        return groups.add_up(x, part, self.down_proj.bias)

    def _activate(self, gates: Tensor, ups: Tensor) -> Tensor:
        activated: Tensor = self.act_fn(gates)
        return activated * ups


class ElasticLlamaAttention(LlamaAttention):
    """Attention that uses its first KV groups only, each with its query heads (paper: heads; groups are ours).

    The unit is the group, so that every sub-network is again a valid GQA model.
    """

    elastic: BlockHandle

    def forward(  # type: ignore[override]  # the stock annotation leaves out that sdpa gives no weights
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to ([B, T, D], attention weights or None)."""
        groups = self.elastic.width(hidden_states)
        if isinstance(groups, TokenGroups):
            assert position_embeddings is not None
            return self._grouped(hidden_states, groups, position_embeddings, attention_mask, past_key_values, **kwargs)
        if groups == self.elastic.full:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        if groups == 0:
            return torch.zeros_like(hidden_states), None
        assert position_embeddings is not None
        shape = hidden_states.shape[:-1]  # B, T
        heads = (*shape, -1, self.head_dim)
        kv_rows = groups * self.head_dim
        query = linear_rows(self.q_proj, hidden_states, kv_rows * self.num_key_value_groups).view(heads).transpose(1, 2)
        key = linear_rows(self.k_proj, hidden_states, kv_rows).view(heads).transpose(1, 2)
        value = linear_rows(self.v_proj, hidden_states, kv_rows).view(heads).transpose(1, 2)  # [B, groups, T, head_dim]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return linear_columns(self.o_proj, output.reshape(*shape, -1)), weights

    def _grouped(
        self,
        hidden_states: Tensor,
        groups: TokenGroups,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Queries and output of every token with its own width; keys and values of all groups for all tokens.

        So what a token gets from its past does not depend on how wide the past was, with a KV cache or without (ours).
        """
        shape = hidden_states.shape[:-1]  # B, T
        heads = (*shape, -1, self.head_dim)
        rows = self.head_dim * self.num_key_value_groups
        queries = linear_bands(self.q_proj, groups, rows)
        query = groups.spread(hidden_states, lambda own, band: F.linear(own, *queries[band]))
        query = query.view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)  # [B, K, T, head_dim]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if not groups.bands:
            return torch.zeros_like(hidden_states), None
        used = groups.units
        output, weights = self._attend(query, key[:, :used], value[:, :used], attention_mask, **kwargs)
        outs = groups.split(self.o_proj.weight, 1, rows)

        def part(own: Tensor, band: int) -> Tensor:
            return F.linear(own[..., groups.bands[band].columns(rows)], outs[band])

        return groups.add_up(output.reshape(*shape, -1), part, self.o_proj.bias), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)


def _uniform_config(config: PreTrainedConfig, groups: int, neurons: int) -> dict[str, Any] | None:
    heads = config.num_attention_heads // config.num_key_value_heads * groups
    # what LlamaConfig demands, although the size of a head is a field of its own
    if config.hidden_size % heads:
        return None
    return {
        "head_dim": config.head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": neurons,
    }


LLAMA = Family(
    model=LlamaForCausalLM,
    layers="model.layers",
    blocks={
        "attention": BlockLayout(
            path="self_attn",
            stock=LlamaAttention,
            elastic=ElasticLlamaAttention,
            full_width=lambda config: config.num_key_value_heads,
            axes=(
                Axis("q_proj.weight", 0),
                Axis("k_proj.weight", 0),
                Axis("v_proj.weight", 0),
                Axis("q_proj.bias", 0),
                Axis("k_proj.bias", 0),
                Axis("v_proj.bias", 0),
                Axis("o_proj.weight", 1),
            ),
            shared=frozenset({"o_proj.bias"}),
            projections=dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), nn.Linear),
            output="o_proj",
        ),
        "mlp": BlockLayout(
            path="mlp",
            stock=LlamaMLP,
            elastic=ElasticLlamaMLP,
            full_width=lambda config: config.intermediate_size,
            axes=(
                Axis("gate_proj.weight", 0),
                Axis("up_proj.weight", 0),
                Axis("gate_proj.bias", 0),
                Axis("up_proj.bias", 0),
                Axis("down_proj.weight", 1),
            ),
            shared=frozenset({"down_proj.bias"}),
            projections=dict.fromkeys(("gate_proj", "up_proj", "down_proj"), nn.Linear),
            output="down_proj",
        ),
    },
    uniform_config=_uniform_config,
)
