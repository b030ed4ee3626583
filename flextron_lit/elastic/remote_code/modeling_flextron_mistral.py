"""Mistral whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from .flextron_layers import OwnLayers


class FlextronMistralConfig(MistralConfig):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_mistral"


class FlextronMistralForCausalLM(OwnLayers, MistralForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronMistralConfig
    make_layer = MistralDecoderLayer
