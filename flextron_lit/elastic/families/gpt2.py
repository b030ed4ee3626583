"""GPT-2: one fused projection for queries, keys and values, biases everywhere, an ungated MLP, learned positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2LMHeadModel, eager_attention_forward
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.families.attention import ElasticAttention, Width
from flextron_lit.elastic.families.base import BlockLayout, Family
from flextron_lit.elastic.families.mlp import ElasticMLP
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import conv1d_bands, conv1d_columns, conv1d_rows


class ElasticGPT2MLP(ElasticMLP, GPT2MLP):  # type: ignore[misc]  # the stock annotation of forward is wrong
    """MLP without a gate that uses its first neurons only."""

    def _prefix(self, hidden_states: Tensor, width: int) -> Tensor:
        hidden = self.act(conv1d_columns(self.c_fc, hidden_states, 0, width))  # [B, T, F]
        return self.dropout(conv1d_rows(self.c_proj, hidden))

    def _grouped(self, hidden_states: Tensor, groups: TokenGroups) -> Tensor:
        return self.dropout(self._by_token(hidden_states, groups))

    def _by_token(self, hidden_states: Tensor, groups: TokenGroups) -> Tensor:
        first, last = self.c_fc, self.c_proj
        inner = conv1d_bands(first, groups)
        outer = groups.split(last.weight, 0)

        def part(rows: Tensor, band: int) -> Tensor:
            return self.act(F.linear(rows, *inner[band])) @ outer[band]

        return groups.add_up(hidden_states, part, last.bias)


class ElasticGPT2Attention(ElasticAttention, GPT2Attention):
    """Multi-head attention that uses its first heads only; a KV group is one head."""

    eager = staticmethod(eager_attention_forward)

    def forward(  # type: ignore[override]  # the stock signature also serves cross-attention, which is not elastic
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to ([B, T, D], attention weights or None)."""
        width = self.elastic.width(hidden_states)
        if width == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states, past_key_values, attention_mask, **kwargs)
        return self.at_width(hidden_states, width, attention_mask, past_key_values, **kwargs)

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        fused, size = self.c_attn, self.split_size
        if isinstance(width, TokenGroups):
            queries = conv1d_bands(fused, width, self.head_dim, size)
            query = width.spread(hidden_states, lambda own, band: F.linear(own, *queries[band]))
            key, value = conv1d_columns(fused, hidden_states, size, 2 * size).chunk(2, -1)
        else:
            # the segments of q, k and v lie apart in the fused weight, so a prefix of each is a view of its own
            starts, rows = (0, size, 2 * size), width * self.head_dim
            query, key, value = (conv1d_columns(fused, hidden_states, start, rows) for start in starts)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        return query.view(heads).transpose(1, 2), key.view(heads).transpose(1, 2), value.view(heads).transpose(1, 2)

    def _projected(self, heads: Tensor, width: Width) -> Tensor:
        if not isinstance(width, TokenGroups):
            return self.resid_dropout(conv1d_rows(self.c_proj, heads))
        outs = width.split(self.c_proj.weight, 0, self.head_dim)

        def part(own: Tensor, band: int) -> Tensor:
            return own[..., width.bands[band].columns(self.head_dim)] @ outs[band]

        return self.resid_dropout(width.add_up(heads, part, self.c_proj.bias))

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.config._attn_implementation == "eager" and self.reorder_and_upcast_attn:
            return self._upcast_and_reordered_attn(query, key, value, attention_mask)
        return super()._attend(query, key, value, attention_mask, **kwargs)

    def _dropout(self) -> float:
        return self.attn_dropout.p


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
