"""Which of Lightning's strategies stages train by, and why not by the others."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from flextron_lit.stages.fully_sharded import NAME, FullySharded

REFUSED = {
    "FSDPStrategy": "is FSDP1, which makes one flat tensor of a layer's weights, and narrower widths take prefixes of "
    "each",
    "DeepSpeedStrategy": "makes the updates itself from one backward pass, and a step here has several",
    "XLAStrategy": "is for TPUs, where nothing of this was run",
    "SingleDeviceXLAStrategy": "is for TPUs, where nothing of this was run",
    "SingleTPUStrategy": "is for TPUs, where nothing of this was run",
}
"""By the name of the class."""
SPAWNED = "trains in processes whose results this one does not get"
SPLIT = "splits weights within a layer, and the first units of a layer, which narrower widths use, would lie on some \
processes alone"
INSTEAD = f"take ddp (every process holds the network) or {NAME} (they share it out)"


def check_strategy(wanted: Any) -> None:
    """Refuse a strategy that would train wrongly, or not at all.

    Args:
        wanted: as a config has it, a name or `class_path` and `init_args`. A class of the user's own is taken; that
            gradients agree is checked at the first update.

    Raises:
        ValueError: with the reason, and what to take instead.
    """
    if isinstance(wanted, str) and "." not in wanted:
        if wanted not in StrategyRegistry:
            # Lightning says which names there are
            return
        known = StrategyRegistry[wanted]
        name, kind, settings = wanted, known["strategy"].__name__, known["init_params"]
    else:
        path = wanted if isinstance(wanted, str) else wanted["class_path"]
        if not path.startswith(("lightning.", "pytorch_lightning.")):
            return
        name = kind = path.rpartition(".")[2]
        settings = {} if isinstance(wanted, str) else wanted.get("init_args") or {}
    _refuse(name, _reason(kind, settings))


def fitting(strategy: Strategy) -> None:
    """Make a trainer's strategy, whose processes have been started, one that a stage trains by.

    Raises:
        ValueError: with the reason, and what to take instead.
    """
    kind = type(strategy).__name__
    if isinstance(strategy.launcher, _MultiProcessingLauncher):
        _refuse(kind, SPAWNED)
    if type(strategy) is ModelParallelStrategy:
        _refuse(kind, _reason(kind, {"tensor_parallel_size": strategy._tensor_parallel_size, "data_parallel_size": 1}))
        # the same processes; what differs is how a run's state is kept
        strategy.__class__ = FullySharded
    _refuse(kind, REFUSED.get(kind))


def _reason(kind: str, settings: Mapping[str, Any]) -> str | None:
    if kind == "DDPStrategy" and settings.get("start_method", "popen") != "popen":
        return SPAWNED
    if kind == "ModelParallelStrategy":
        if settings.get("tensor_parallel_size", "auto") != 1:
            return f"with a tensor_parallel_size other than 1 {SPLIT}"
        if settings.get("data_parallel_size", "auto") == "auto":
            return "has one process a machine with a data_parallel_size of auto"
    return REFUSED.get(kind)


def _refuse(name: str, reason: str | None) -> None:
    if reason is not None:
        raise ValueError(f"trainer.strategy {name} {reason}; {INSTEAD}")
