"""GPT-2 whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

from .flextron_layers import no_layers, own_layers


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


class FlextronGPT2Attention(GPT2Attention):
    """Attention with fewer heads than its hidden size has room for."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx=layer_idx)
        self.num_heads = config.num_key_value_heads
        self.split_size = self.num_heads * self.head_dim
        self.c_attn = Conv1D(3 * self.split_size, self.embed_dim)
        self.c_proj = Conv1D(self.embed_dim, self.split_size)


def _layer(config: PreTrainedConfig, index: int) -> GPT2Block:
    layer = GPT2Block(config, index)
    layer.attn = FlextronGPT2Attention(config, index)
    return layer


class FlextronGPT2LMHeadModel(GPT2LMHeadModel):
    """The stock causal LM but for its layers."""

    config_class = FlextronGPT2Config

    def __init__(self, config: FlextronGPT2Config) -> None:
        with no_layers(config):
            super().__init__(config)
        self.transformer.h = own_layers(config, _layer, "attn", "mlp")
        self.post_init()
