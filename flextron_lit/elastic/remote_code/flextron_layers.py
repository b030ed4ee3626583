"""Layers of a sub-network that Flextron cut out of a larger model: every layer has widths of its own.

`per_layer_config` in config.json says them; its `skip` names modules that are left out. This file comes with the
weights: it needs torch and transformers alone.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicSlidingWindowLayer

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


def pass_over(cache: Any, layer: int, hidden_states: Tensor) -> None:
    """Tell a KV cache of tokens [B, T, D] that a layer without attention reads nothing of.

    A layer with a sliding window counts its tokens, and cannot take back those that it has not seen: it gets keys and
    values of no heads, which take no memory. All other kinds of layers are left alone.
    """
    # one that was made without a config has no more layers than were read
    own = None if cache is None else next(iter(cache.layers[layer : layer + 1]), None)
    if isinstance(own, DynamicSlidingWindowLayer):
        nothing = hidden_states.new_empty(hidden_states.shape[0], 0, hidden_states.shape[1], 1)
        cache.update(nothing, nothing, layer)


class SkippedAttention(nn.Module):
    """Stands where the attention module of a layer is left out: adds nothing."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_idx = layer

    def forward(
        self, hidden_states: Tensor, *_: Any, past_key_values: Cache | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        """[B, T, D] to (zeros of that shape, no attention weights)."""
        pass_over(past_key_values, self.layer_idx, hidden_states)
        return torch.zeros_like(hidden_states), None


def heads_unsaid(*_: Any) -> None:
    """In place of the library's, which makes static caches ahead of the first pass: of the heads that a config says."""
    return


class OwnLayers:
    """Makes a stock causal LM, which comes after it among the bases, one whose layers have widths of their own."""

    layers_path: ClassVar[str] = "model.layers"
    """Attribute path of the decoder layers."""
    attention_path: ClassVar[str] = "self_attn"
    """Attribute of a layer that holds its attention module."""
    make_layer: Callable[[Any, int], nn.Module]
    """Makes a layer from its config and its index."""
    _get_static_cache_init_shape = heads_unsaid

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
            setattr(layer, self.attention_path, SkippedAttention(index))
        else:
            # a later `set_attn_implementation` changes the model's config, not the copies that layers are built from
            getattr(layer, self.attention_path).config = config
        if "mlp" in own.skip:
            layer.mlp = SkippedMLP()
        return layer
