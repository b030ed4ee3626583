"""Gemma (the first): as Llama; what is its own, scaled embeddings and other norms, lies outside the elastic blocks."""

from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaForCausalLM, GemmaMLP

from flextron_lit.elastic.families.base import Family
from flextron_lit.elastic.families.mlp import GatedMLP
from flextron_lit.elastic.families.rotary import RotaryAttention


class ElasticGemmaMLP(GatedMLP, GemmaMLP):
    """Gated MLP that uses its first neurons only."""


class ElasticGemmaAttention(RotaryAttention, GemmaAttention):
    """Attention that uses its first KV groups only."""


GEMMA = Family(GemmaForCausalLM, {"attention": ElasticGemmaAttention, "mlp": ElasticGemmaMLP})
