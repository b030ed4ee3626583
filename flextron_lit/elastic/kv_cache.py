"""KV caches that take tokens back: a decode step is undone, a draft is refused."""

from typing import Any, cast

from transformers import DynamicCache


def retractable(cache: DynamicCache) -> DynamicCache:
    """The same cache; from now on its layers with a sliding window keep what is behind it until `retract` is called."""
    cache.activate_past_recording()
    return cache


def retract(cache: DynamicCache, tokens: int) -> None:
    """Forget so many of the last tokens."""
    for layer in cast(list[Any], cache.layers):
        # a layer whose attention is skipped has read nothing, and some kinds of layers cannot crop that
        if layer.is_initialized:
            layer.crop(-tokens)
