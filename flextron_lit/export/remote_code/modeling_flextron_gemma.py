"""Gemma whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from __future__ import annotations

from transformers import GemmaConfig, GemmaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer

from .flextron_layers import no_layers, own_layers


class FlextronGemmaConfig(GemmaConfig):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_gemma"


class FlextronGemmaForCausalLM(GemmaForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronGemmaConfig

    def __init__(self, config: FlextronGemmaConfig) -> None:
        with no_layers(config):
            super().__init__(config)
        self.model.layers = own_layers(config, GemmaDecoderLayer, "self_attn", "mlp")
        self.post_init()
