"""Where two nested values differ, key by key."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

LISTED = 12


def differences(before: Any, after: Any, key: str = "") -> Iterator[str]:
    """Lines `key: old -> new` where two nested configs differ."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in [*before, *(n for n in after if n not in before)]:
            yield from differences(before.get(name), after.get(name), f"{key}.{name}" if key else str(name))
    elif before != after:
        yield f"{key}: {before!r} -> {after!r}"


def listed(lines: Sequence[str]) -> Iterator[str]:
    """As many lines as one reads, indented, and how many more there are."""
    yield from (f"  {line}" for line in lines[:LISTED])
    if len(lines) > LISTED:
        yield f"  and {len(lines) - LISTED} more"
