"""Qwen3 whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from .flextron_layers import OwnLayers


class FlextronQwen3Config(Qwen3Config):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_qwen3"


class FlextronQwen3ForCausalLM(OwnLayers, Qwen3ForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronQwen3Config
    make_layer = Qwen3DecoderLayer
