"""Llama, and the families whose layers have its names: each two classes that say what differs, and a `Family`."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaForCausalLM, GemmaMLP
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralForCausalLM, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3MLP
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention, SmolLM3ForCausalLM, SmolLM3MLP

from flextron_lit.elastic.families.attention import ElasticAttention, Width
from flextron_lit.elastic.families.base import Family, uniform_config
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import first_rows, spread_rows


class RotaryAttention(ElasticAttention):
    """Grouped-query or multi-head attention with rotary positions, as in Llama."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    num_key_value_groups: int
    path = "self_attn"
    inner = ("q_proj", "k_proj", "v_proj")
    outer = "o_proj"
    eager = staticmethod(eager_attention_forward)
    rotate = staticmethod(apply_rotary_pos_emb)

    @staticmethod
    def full_width(config: PreTrainedConfig) -> int:
        """Its KV groups."""
        return int(config.num_key_value_heads)

    @property
    def query_rows(self) -> int:
        """Rows of the queries of one KV group, which has several heads (stock: "groups" are the heads of one)."""
        return self.num_key_value_groups * self.head_dim

    def _heads(self, hidden_states: Tensor, width: Width) -> tuple[Tensor, Tensor, Tensor]:
        if isinstance(width, TokenGroups):
            query = spread_rows(self.q_proj, hidden_states, width, self.query_rows)
            return query, self.k_proj(hidden_states), self.v_proj(hidden_states)
        query = first_rows(self.q_proj, hidden_states, width * self.query_rows)
        key, value = (first_rows(each, hidden_states, width * self.head_dim) for each in (self.k_proj, self.v_proj))
        return query, key, value


class ElasticLlamaMLP(GatedMLP, LlamaMLP):
    """Gated MLP that uses its first neurons only."""


class ElasticLlamaAttention(RotaryAttention, LlamaAttention):  # type: ignore[misc]  # sdpa gives no attention weights
    """Attention that uses its first KV groups only."""


def _llama_config(config: PreTrainedConfig, groups: int, neurons: int) -> dict[str, Any] | None:
    fields = uniform_config(config, groups, neurons)
    # what LlamaConfig demands, although the size of a head is a field of its own
    return None if config.hidden_size % fields["num_attention_heads"] else fields


LLAMA = Family(
    LlamaForCausalLM, {"attention": ElasticLlamaAttention, "mlp": ElasticLlamaMLP}, uniform_config=_llama_config
)


class ElasticMistralMLP(GatedMLP, MistralMLP):
    """Gated MLP that uses its first neurons only."""


class ElasticMistralAttention(RotaryAttention, MistralAttention):
    """As Llama's, with one sliding window for all layers or none."""

    @property
    def sliding_window(self) -> int | None:  # type: ignore[override]  # read only
        """That of the config: the stock modules hold none."""
        return self.config.sliding_window


MISTRAL = Family(MistralForCausalLM, {"attention": ElasticMistralAttention, "mlp": ElasticMistralMLP})


class ElasticQwen2MLP(GatedMLP, Qwen2MLP):
    """Gated MLP that uses its first neurons only."""


class ElasticQwen2Attention(RotaryAttention, Qwen2Attention):
    """As Llama's, with biases on queries, keys and values; layers may have sliding windows."""


QWEN2 = Family(Qwen2ForCausalLM, {"attention": ElasticQwen2Attention, "mlp": ElasticQwen2MLP})


class ElasticQwen3MLP(GatedMLP, Qwen3MLP):
    """Gated MLP that uses its first neurons only."""


class ElasticQwen3Attention(RotaryAttention, Qwen3Attention):
    """With a norm on every query and key head, the same for all heads; layers may have sliding windows."""

    shared = frozenset({"q_norm.weight", "k_norm.weight"})

    def _placed(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super()._placed(self.q_norm(query), self.k_norm(key), position_embeddings)


QWEN3 = Family(Qwen3ForCausalLM, {"attention": ElasticQwen3Attention, "mlp": ElasticQwen3MLP})


class ElasticSmolLM3MLP(GatedMLP, SmolLM3MLP):
    """Gated MLP that uses its first neurons only."""


class ElasticSmolLM3Attention(RotaryAttention, SmolLM3Attention):
    """As Llama's, but some layers know no positions; layers may have sliding windows."""

    def _placed(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return super()._placed(query, key, position_embeddings) if self.use_rope else (query, key)


SMOLLM3 = Family(SmolLM3ForCausalLM, {"attention": ElasticSmolLM3Attention, "mlp": ElasticSmolLM3MLP})


class ElasticGemmaMLP(GatedMLP, GemmaMLP):
    """Gated MLP that uses its first neurons only."""


class ElasticGemmaAttention(RotaryAttention, GemmaAttention):
    """As Llama's; what is Gemma's own, scaled embeddings and other norms, lies outside the elastic blocks."""


GEMMA = Family(GemmaForCausalLM, {"attention": ElasticGemmaAttention, "mlp": ElasticGemmaMLP})
