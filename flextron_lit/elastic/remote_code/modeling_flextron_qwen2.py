"""Qwen2 whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from .flextron_layers import OwnLayers


class FlextronQwen2Config(Qwen2Config):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_qwen2"


class FlextronQwen2ForCausalLM(OwnLayers, Qwen2ForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronQwen2Config
    make_layer = Qwen2DecoderLayer
