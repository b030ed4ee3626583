"""The config that a run folder keeps: one name for every class, and older ones in today's form."""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

OWN = ("flextron_lit.", "callbacks.")
"""How the class paths of ours begin, as configs may write them."""
DONE_THEN: dict[str, tuple[Any, Any]] = {
    "model.init_args.calibration.importance": ("magnitude", "greedy"),
    "model.init_args.calibration.compensation": ("none", "own"),
    "model.init_args.calibration.excess_tokens": (0, 8192),
    "model.init_args.loss_chunk": (0, None),
    "data.init_args.special_tokens": (False, None),
    "data.init_args.domains.*.format": ("text", None),
    "data.init_args.domains.*.clean": (False, True),
}
"""Settings whose default is not what was done before: dotted name in a stage's config (`*` is every name that stands
there), what was done, and the default.
Whoever changes what a run does by default adds a row, so that unfinished runs of before still resume, and go on as they
were begun; a new setting whose default is what was done before needs none."""
NOTHING = object()
EVERY = "*"
Place = tuple[str, ...]
"""The names that lead to a setting."""


def canonical(value: Any) -> Any:
    """The same with every class of ours under its shortest public name, however the user wrote it."""
    if isinstance(value, Mapping):
        found = {name: canonical(inner) for name, inner in value.items()}
        return found | ({"class_path": _public(value["class_path"])} if "class_path" in value else {})
    return [canonical(inner) for inner in value] if isinstance(value, list) else value


def _public(path: str) -> str:
    if not path.startswith(OWN):
        return path
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    parts = found.__module__.split(".")
    packages = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
    return next(f"{each}.{name}" for each in packages if getattr(sys.modules[each], name, None) is found)


def completed(config: Mapping[str, Any], done_then: Mapping[str, tuple[Any, Any]] = DONE_THEN) -> dict[str, Any]:
    """An older config with what was done then, where it lacks a setting."""
    made = dict(config)
    for key, (value, today) in done_then.items():
        first, _, rest = key.partition(".")
        for name in list(made) if first == EVERY else [first]:
            if not rest:
                made.setdefault(name, value)
            elif isinstance(made.get(name), Mapping):
                made[name] = completed(made[name], {rest: (value, today)})
    return made


def as_begun(
    config: Mapping[str, Any], before: Mapping[str, Any], done_then: Mapping[str, tuple[Any, Any]] = DONE_THEN
) -> dict[Place, Any]:
    """With what a run of an older program goes on, where today's config has no more than today's default.

    Args:
        config: of today, resolved.
        before: of the run, as its program wrote it.
        done_then: rows as in `DONE_THEN`.

    Returns:
        Values by where they stand; none for a run of this program.
    """
    rows = {place: row for key, row in done_then.items() for place in _places(before, key)}
    kept = {place: _value(before, place) for place in rows}
    if not any(value is NOTHING and _value(config, place) is not NOTHING for place, value in kept.items()):
        return {}
    return {
        place: then
        for place, (then, today) in rows.items()
        if kept[place] in (NOTHING, then) and _value(config, place) == today
    }


def _places(config: Any, key: str) -> list[Place]:
    """Where a row stands in a config."""
    first, _, rest = key.partition(".")
    names = (list(config) if isinstance(config, Mapping) else []) if first == EVERY else [first]
    if not rest:
        return [(name,) for name in names]
    return [(name, *place) for name in names for place in _places(_value(config, (name,)), rest)]


def _value(config: Any, place: Place) -> Any:
    for name in place:
        config = config.get(name, NOTHING) if isinstance(config, Mapping) else NOTHING
    return config
