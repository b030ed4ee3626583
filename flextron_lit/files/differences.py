"""Where two nested values differ, key by key."""

from collections.abc import Iterator, Mapping
from typing import Any


def differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Lines `key: old -> new` where two nested configs differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in [*before, *(n for n in after if n not in before)]:
            yield from differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield f"{key}: {before!r} -> {after!r}"
