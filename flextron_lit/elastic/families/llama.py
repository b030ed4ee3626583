"""Llama: the first of the rotary families."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaMLP

from flextron_lit.elastic.families.base import Family, uniform_config
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.families.rotary import RotaryAttention


class ElasticLlamaMLP(GatedMLP, LlamaMLP):
    """Gated MLP that uses its first neurons only."""


class ElasticLlamaAttention(RotaryAttention, LlamaAttention):  # type: ignore[misc]  # sdpa gives no attention weights
    """Attention that uses its first KV groups only."""


def _uniform_config(config: PreTrainedConfig, groups: int, neurons: int) -> dict[str, Any] | None:
    fields = uniform_config(config, groups, neurons)
    # what LlamaConfig demands, although the size of a head is a field of its own
    return None if config.hidden_size % fields["num_attention_heads"] else fields


LLAMA = Family(
    LlamaForCausalLM, {"attention": ElasticLlamaAttention, "mlp": ElasticLlamaMLP}, uniform_config=_uniform_config
)
