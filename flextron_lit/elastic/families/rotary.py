"""What Llama and the families after it share: separate projections, rotary positions, GQA, a gated MLP, the names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.families.attention import ElasticAttention, Width, linear_out
from flextron_lit.elastic.families.base import BlockLayout, Family
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import linear_bands, linear_rows


class RotaryAttention(ElasticAttention):
    """Grouped-query or multi-head attention with rotary positions, as in Llama."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    head_dim: int
    num_key_value_groups: int
    eager = staticmethod(eager_attention_forward)
    rotate = staticmethod(apply_rotary_pos_emb)

    @property
    def window(self) -> int | None:
        """The layer's own, where the family has one for each layer."""
        return getattr(self, "sliding_window", None)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, D] to ([B, T, D], attention weights or None)."""
        width = self.elastic.width(hidden_states)
        if width == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        return self.at_width(hidden_states, width, attention_mask, past_key_values, position_embeddings, **kwargs)

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        keys_values = (self.k_proj, self.v_proj)
        if isinstance(width, TokenGroups):
            queries = linear_bands(self.q_proj, width, self._query_rows)
            query = width.spread(hidden_states, lambda own, band: F.linear(own, *queries[band]))
            key, value = (linear(hidden_states) for linear in keys_values)
        else:
            query = linear_rows(self.q_proj, hidden_states, width * self._query_rows)
            key, value = (linear_rows(linear, hidden_states, width * self.head_dim) for linear in keys_values)
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        return query.view(heads).transpose(1, 2), key.view(heads).transpose(1, 2), value.view(heads).transpose(1, 2)

    def _projected(self, heads: Tensor, width: Width) -> Tensor:
        return linear_out(self.o_proj, heads, width, self._query_rows)

    @property
    def _query_rows(self) -> int:
        """Rows of the queries of one KV group."""
        return self.num_key_value_groups * self.head_dim


def uniform_config(config: PreTrainedConfig, groups: int, neurons: int) -> dict[str, Any]:
    """Config fields of a model with so many KV groups and neurons in every layer; heads keep their size."""
    return {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "num_attention_heads": config.num_attention_heads // config.num_key_value_heads * groups,
        "num_key_value_heads": groups,
        "intermediate_size": neurons,
    }


def rotary_family(
    model: type[PreTrainedModel],
    attention: tuple[type[nn.Module], type[RotaryAttention]],
    mlp: tuple[type[nn.Module], type[GatedMLP]],
    shared: frozenset[str] = frozenset(),
    uniform_config: Callable[[PreTrainedConfig, int, int], dict[str, Any] | None] = uniform_config,
) -> Family:
    """A family whose modules and parameters have Llama's names.

    Args:
        model: the causal LM class.
        attention: its attention class, and the elastic one.
        mlp: its MLP class, and the elastic one.
        shared: parameters of the attention that Llama does not have and that all widths use whole.
        uniform_config: see `Family`.
    """
    return Family(
        model=model,
        layers="model.layers",
        blocks={
            "attention": BlockLayout(
                path="self_attn",
                stock=attention[0],
                elastic=attention[1],
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
                shared=shared | {"o_proj.bias"},
                projections=dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), nn.Linear),
                output="o_proj",
            ),
            "mlp": BlockLayout(
                path="mlp",
                stock=mlp[0],
                elastic=mlp[1],
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
        uniform_config=uniform_config,
    )
