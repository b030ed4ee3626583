"""GPT-NeoX whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

from .flextron_layers import OwnLayers


@strict
class FlextronGPTNeoXConfig(GPTNeoXConfig):
    """Heads (`num_key_value_heads`) and neurons (`intermediate_size`) of every layer in `per_layer_config`.

    `num_attention_heads` is that of the model it was cut out of: the size of a head follows from it. The KV cache
    reads `num_key_value_heads`, where stock GPT-NeoX has no such field.
    """

    model_type = "flextron_gpt_neox"
    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


class FlextronGPTNeoXForCausalLM(OwnLayers, GPTNeoXForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronGPTNeoXConfig
    layers_path = "gpt_neox.layers"
    attention_path = "attention"

    @staticmethod
    def make_layer(config: Any, index: int) -> GPTNeoXLayer:
        """A stock layer, but for attention with fewer heads than the hidden size has room for."""
        layer = GPTNeoXLayer(config, index)
        attention = layer.attention
        rows, bias = config.num_key_value_heads * attention.head_size, config.attention_bias
        attention.query_key_value = nn.Linear(config.hidden_size, 3 * rows, bias=bias)
        attention.dense = nn.Linear(rows, config.hidden_size, bias=bias)
        return layer
