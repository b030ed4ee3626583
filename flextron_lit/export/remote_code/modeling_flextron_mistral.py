"""Mistral whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from __future__ import annotations

from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer

from .flextron_layers import no_layers, own_layers


class FlextronMistralConfig(MistralConfig):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_mistral"


class FlextronMistralForCausalLM(MistralForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronMistralConfig

    def __init__(self, config: FlextronMistralConfig) -> None:
        with no_layers(config):
            super().__init__(config)
        self.model.layers = own_layers(config, MistralDecoderLayer, "self_attn", "mlp")
        self.post_init()
