"""SmolLM3 whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from __future__ import annotations

from transformers import SmolLM3Config, SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from .flextron_layers import no_layers, own_layers


class FlextronSmolLM3Config(SmolLM3Config):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_smollm3"


class FlextronSmolLM3ForCausalLM(SmolLM3ForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronSmolLM3Config

    def __init__(self, config: FlextronSmolLM3Config) -> None:
        with no_layers(config):
            super().__init__(config)
        self.model.layers = own_layers(config, SmolLM3DecoderLayer, "self_attn", "mlp")
        self.post_init()
