"""Qwen2: as Llama, with biases on queries, keys and values; layers may have sliding windows."""

from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2MLP

from flextron_lit.elastic.families.base import Family
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.families.rotary import RotaryAttention


class ElasticQwen2MLP(GatedMLP, Qwen2MLP):
    """Gated MLP that uses its first neurons only."""


class ElasticQwen2Attention(RotaryAttention, Qwen2Attention):
    """Attention that uses its first KV groups only."""


QWEN2 = Family(Qwen2ForCausalLM, {"attention": ElasticQwen2Attention, "mlp": ElasticQwen2MLP})
