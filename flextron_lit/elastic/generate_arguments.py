"""What Hugging Face's `generate` is told: who reads along, and the KV cache that compiled widths need."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

from transformers import GenerationMixin
from transformers.generation.streamers import BaseStreamer

ARGUMENTS = tuple(signature(GenerationMixin.generate).parameters)[1:]
"""Their names."""
OTHER_CACHES = (
    "past_key_values",
    "cache_implementation",
    "use_cache",
    "assistant_model",
    "prompt_lookup_num_tokens",
    "custom_generate",
)
"""Those that bring a cache of their own or take tokens back, which a static one cannot."""


@contextmanager
def ended(streamer: BaseStreamer | None) -> Iterator[None]:
    """End a streamer also if the generation inside fails: who reads from it would wait for ever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise


def for_compiled(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What to add for compiled widths: a static KV cache, unless one is asked for, and nothing compiled whole."""
    given = named(args, kwargs)
    asked = vars(given.get("generation_config") or object).get("cache_implementation")
    other = asked or any(given.get(name) is not None for name in OTHER_CACHES)
    return {"disable_compile": True, **({} if other else {"cache_implementation": "static"})}


def named(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, whether they were given by name or by place."""
    return dict(zip(ARGUMENTS, args, strict=False)) | dict(kwargs)
