"""GPT-2: one fused projection for queries, keys and values, biases everywhere, an ungated MLP, learned positions."""

from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2LMHeadModel, eager_attention_forward
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.families.attention import ElasticAttention, Width
from flextron_lit.elastic.families.base import Family, neurons_alone
from flextron_lit.elastic.families.mlp import PlainMLP
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import first_rows, spread_rows


class ElasticGPT2MLP(PlainMLP, GPT2MLP):  # type: ignore[misc]  # the stock annotation of forward is wrong
    """MLP without a gate that uses its first neurons only."""

    norm = "ln_2"
    inner = ("c_fc",)
    outer = "c_proj"
    linear = Conv1D

    @staticmethod
    def full_width(config: PreTrainedConfig) -> int:
        """Its neurons; unless the config says otherwise, four times the hidden size."""
        return int(config.n_inner or 4 * config.hidden_size)

    def _prefix(self, hidden_states: Tensor, width: int) -> Tensor:
        return self.dropout(super()._prefix(hidden_states, width))

    def _grouped(self, hidden_states: Tensor, groups: TokenGroups) -> Tensor:
        return self.dropout(super()._grouped(hidden_states, groups))


class ElasticGPT2Attention(ElasticAttention, GPT2Attention):  # type: ignore[misc]  # may have cross-attention
    """Multi-head attention that uses its first heads only; a KV group is one head."""

    path = "attn"
    norm = "ln_1"
    inner = ("c_attn",)
    outer = "c_proj"
    linear = Conv1D
    parts = 3
    eager = staticmethod(eager_attention_forward)

    @property
    def attention_dropout(self) -> float:  # type: ignore[override]  # read only
        """The stock module has a layer for it."""
        return self.attn_dropout.p

    def narrow(self, width: int) -> None:
        """The stock forward splits and reshapes by these two."""
        self.num_heads = width
        self.split_size = width * self.head_dim

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        fused, size = self.c_attn, self.split_size
        if isinstance(width, TokenGroups):
            query = spread_rows(fused, hidden_states, width, self.head_dim)
            key, value = first_rows(fused, hidden_states, 2 * size, start=size).chunk(2, -1)
        else:
            # the segments of q, k and v lie apart in the fused weight, so a prefix of each is a view of its own
            starts, rows = (0, size, 2 * size), width * self.head_dim
            query, key, value = (first_rows(fused, hidden_states, rows, start) for start in starts)
        return query, key, value

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if self.config._attn_implementation == "eager" and self.reorder_and_upcast_attn:
            return self._upcast_and_reordered_attn(query, key, value, attention_mask)
        return super()._attend(query, key, value, attention_mask, **kwargs)

    def _projected(self, heads: Tensor, width: Width) -> Tensor:
        return self.resid_dropout(super()._projected(heads, width))


GPT2 = Family(
    GPT2LMHeadModel,
    {"attention": ElasticGPT2Attention, "mlp": ElasticGPT2MLP},
    layers="transformer.h",
    uniform_config=partial(neurons_alone, name="n_inner"),
)
