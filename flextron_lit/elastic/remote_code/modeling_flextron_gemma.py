"""Gemma whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer

from .flextron_layers import OwnLayers


class FlextronGemmaConfig(GemmaConfig):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_gemma"


class FlextronGemmaForCausalLM(OwnLayers, GemmaForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronGemmaConfig
    make_layer = GemmaDecoderLayer
