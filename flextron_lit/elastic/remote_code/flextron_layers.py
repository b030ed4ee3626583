"""Layers of a sub-network that Flextron cut out of a larger model: every layer has widths of its own.

`per_layer_config` in config.json says them; its `skip` names modules that are left out. This file comes with the
weights: it needs torch and transformers alone.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

if not hasattr(transformers.PretrainedConfig, "is_heterogeneous"):
    raise ImportError(
        "this model's layers have widths of their own (per_layer_config), which transformers "
        f"{transformers.__version__} cannot read: pip install 'transformers>=5.23'"
    )


class SkippedMLP(nn.Module):
    """Stands where an MLP is left out: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] to zeros of that shape."""
        return torch.zeros_like(hidden_states)


class SkippedAttention(nn.Module):
    """Stands where an attention module is left out: adds nothing, and leaves the KV cache alone."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """[B, T, D] to (zeros of that shape, no attention weights)."""
        return torch.zeros_like(hidden_states), None


class OwnLayers:
    """Makes a stock causal LM, which comes after it among the bases, one whose layers have widths of their own."""

    layers_path: ClassVar[str] = "model.layers"
    """Attribute path of the decoder layers."""
    attention_path: ClassVar[str] = "self_attn"
    """Attribute of a layer that holds its attention module."""
    make_layer: Callable[[Any, int], nn.Module]
    """Makes a layer from its config and its index."""

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        count = config.num_hidden_layers
        # the stock class builds everything but its layers: it knows one width for all of them
        config.num_hidden_layers = 0
        try:
            super().__init__(config)  # type: ignore[call-arg]
        finally:
            config.num_hidden_layers = count
        model: Any = self
        for index, own in enumerate(config.per_layer_config):
            model.get_submodule(self.layers_path).append(self._layer(config, own, index))
        model.post_init()

    def _layer(self, config: transformers.PreTrainedConfig, own: Any, index: int) -> nn.Module:
        layer: Any = self.make_layer(own, index)
        if self.attention_path in own.skip:
            setattr(layer, self.attention_path, SkippedAttention())
        else:
            # a later `set_attn_implementation` changes the model's config, not the copies that layers are built from
            getattr(layer, self.attention_path).config = config
        if "mlp" in own.skip:
            layer.mlp = SkippedMLP()
        return layer
