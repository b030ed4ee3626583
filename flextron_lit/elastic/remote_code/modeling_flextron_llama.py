"""Llama whose layers differ in width, with skips and numbers of heads that no stock class holds.

See `flextron_layers.py`.
"""

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .flextron_layers import OwnLayers


# validators are bound when the decorator runs: without it the parent's would still hold
@strict
class FlextronLlamaConfig(LlamaConfig):
    """Heads, KV heads and neurons of every layer in `per_layer_config`; the size of a head is the same in all."""

    model_type = "flextron_llama"

    def validate_architecture(self) -> None:
        """Heads need not divide the hidden size: `head_dim` says how large they are."""
        assert self.head_dim is not None


class FlextronLlamaForCausalLM(OwnLayers, LlamaForCausalLM):
    """The stock causal LM but for its layers."""

    config_class = FlextronLlamaConfig
    make_layer = LlamaDecoderLayer
