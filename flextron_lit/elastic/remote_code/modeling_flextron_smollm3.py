"""SmolLM3 whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from transformers import SmolLM3Config, SmolLM3ForCausalLM
from transformers.models.smollm3.modeling_smollm3 import SmolLM3DecoderLayer

from .flextron_layers import OwnLayers


class FlextronSmolLM3Config(SmolLM3Config):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_smollm3"


class FlextronSmolLM3ForCausalLM(OwnLayers, SmolLM3ForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronSmolLM3Config
    make_layer = SmolLM3DecoderLayer
