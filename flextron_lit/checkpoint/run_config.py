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
}
"""Settings whose default is not what was done before: dotted name in a stage's config, what was done, and the default.
Whoever changes what a run does by default adds a row, so that unfinished runs of before still resume, and go on as they
were begun; a new setting whose default is what was done before needs none."""
NOTHING = object()


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
        name, _, rest = key.partition(".")
        if not rest:
            made.setdefault(name, value)
        elif isinstance(made.get(name), Mapping):
            made[name] = completed(made[name], {rest: (value, today)})
    return made


def as_begun(
    config: Mapping[str, Any], before: Mapping[str, Any], done_then: Mapping[str, tuple[Any, Any]] = DONE_THEN
) -> dict[str, Any]:
    """With what a run of an older program goes on, where today's config has no more than today's default.

    Args:
        config: of today, resolved.
        before: of the run, as its program wrote it.
        done_then: rows as in `DONE_THEN`.

    Returns:
        Values by dotted name; none for a run of this program.
    """
    kept = {key: _value(before, key) for key in done_then}
    if NOTHING not in kept.values():
        return {}
    return {
        key: then
        for key, (then, today) in done_then.items()
        if kept[key] in (NOTHING, then) and _value(config, key) == today
    }


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config.get(name, NOTHING) if isinstance(config, Mapping) else NOTHING
    return config
