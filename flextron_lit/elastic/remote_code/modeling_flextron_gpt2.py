"""GPT-2 whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.pytorch_utils import Conv1D

from .flextron_layers import OwnLayers


@strict
class FlextronGPT2Config(GPT2Config):
    """Heads (`num_key_value_heads`) and neurons (`n_inner`) of every layer in `per_layer_config`.

    `n_head` is that of the model it was cut out of: the size of a head follows from it. The KV cache reads
    `num_key_value_heads`, where stock GPT-2 has no such field.
    """

    model_type = "flextron_gpt2"
    num_key_value_heads: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.n_head
        super().__post_init__(**kwargs)


class FlextronGPT2LMHeadModel(OwnLayers, GPT2LMHeadModel):
    """The stock causal LM but for its layers."""

    config_class = FlextronGPT2Config
    layers_path = "transformer.h"
    attention_path = "attn"

    @staticmethod
    def make_layer(config: Any, index: int) -> GPT2Block:
        """A stock layer, but for attention with fewer heads than the hidden size has room for."""
        layer = GPT2Block(config, index)
        attention = layer.attn
        attention.num_heads = config.num_key_value_heads
        attention.split_size = rows = attention.num_heads * attention.head_dim
        attention.c_attn = Conv1D(3 * rows, config.hidden_size)
        attention.c_proj = Conv1D(config.hidden_size, rows)
        return layer
