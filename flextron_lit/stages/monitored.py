"""Metrics that callbacks wait for: one that nobody logs would end a run at its first validation, or never."""

import difflib
from collections.abc import Collection, Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

VALIDATION = "val/"


def awaited(callbacks: Iterable[Callback]) -> list[tuple[str, str]]:
    """Name of each callback that waits for a metric, and the metric."""
    waiting = (each for each in callbacks if isinstance(each, EarlyStopping | ModelCheckpoint))
    return [(type(each).__name__, each.monitor) for each in waiting if each.monitor and getattr(each, "strict", True)]


def check_validated(callbacks: Iterable[Callback], logged: Collection[str]) -> None:
    """Refuse to wait for a validation metric that a validation has not logged.

    Args:
        callbacks: of the trainer.
        logged: names of all metrics of a validation.

    Raises:
        ValueError: naming the callback, the metric, and those that are nearest.
    """
    for name, metric in awaited(callbacks):
        if metric.startswith(VALIDATION) and metric not in logged:
            raise ValueError(absent(name, metric, logged))


def absent(name: str, metric: str, logged: Collection[str]) -> str:
    """What to say of a callback that waits for what nobody logs."""
    near = difflib.get_close_matches(metric, logged, n=4, cutoff=0.0)
    return f"{name} waits for {metric}, which is not logged; there are {', '.join(near)}, and others"
