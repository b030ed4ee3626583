"""The settings that runs are compared by, out of a resolved config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TRAINER = ("max_steps", "max_epochs", "precision", "devices", "num_nodes")
OF_CLASSES = ("lr", "weight_decay")
"""What is told of an optimizer, beside its class: the rest is rarely set and would be most of the table."""


def hyperparameters(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Settings by dotted names without `init_args`; ours.

    Args:
        config: what a run folder's `config.yaml` holds.

    Returns:
        `stage`, `seed`, and what is set under `model`, `data`, `trainer` and by callback; lists as text.
    """
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    found: dict[str, Any] = {"stage": _class_name(model["class_path"]), "seed": config["seed_everything"]}
    found |= _flat("model", model["init_args"])
    found |= _flat("data", {**data, "domains": list(data["domains"])})
    found |= _flat("trainer", {name: trainer[name] for name in TRAINER})
    for callback in trainer["callbacks"] or ():
        found |= _flat(_class_name(callback["class_path"]), callback.get("init_args", {}))
    return {name: ", ".join(map(str, each)) if isinstance(each, list) else each for name, each in found.items()}


def _flat(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_leaves(name, settings))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and "class_path" in value:
        yield name, _class_name(value["class_path"])
        value = {each: value.get("init_args", {}).get(each) for each in OF_CLASSES}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif value is not None:
        yield name, value


def _class_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]
