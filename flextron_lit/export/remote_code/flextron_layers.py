"""Layers of a sub-network that Flextron cut out of a larger model: every layer has widths of its own.

`per_layer_config` in config.json says them; its `skip` names modules that are left out. This file comes with the
weights: it needs torch and transformers alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig


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


@contextmanager
def no_layers(config: PreTrainedConfig) -> Iterator[None]:
    """Let a stock class build everything but its layers: it knows one width for all of them."""
    count = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = count


def own_layers(
    config: PreTrainedConfig, build: Callable[[Any, int], nn.Module], attention: str, mlp: str
) -> nn.ModuleList:
    """The decoder layers, each built from its own config.

    Args:
        config: with `per_layer_config`.
        build: makes a layer from its config and its index.
        attention: attribute of a layer that holds its attention module.
        mlp: the same for its MLP.
    """
    layers = nn.ModuleList()
    for index, own in enumerate(config.per_layer_config):
        layer: Any = build(own, index)
        if attention in own.skip:
            setattr(layer, attention, SkippedAttention())
        else:
            # a later `set_attn_implementation` changes the model's config, not the copies that layers are built from
            getattr(layer, attention).config = config
        if mlp in own.skip:
            setattr(layer, mlp, SkippedMLP())
        layers.append(layer)
    return layers
