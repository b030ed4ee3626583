"""The trainer's precision: which ones a stage has, and what a `true` one is the type of."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.plugins.precision import (
    BitsandbytesPrecision,
    DoublePrecision,
    HalfPrecision,
    Precision,
    TransformerEnginePrecision,
)
from torch.nn import Module

TRUE: dict[str, torch.dtype] = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
INSTEAD = "set trainer.precision to bf16-mixed, bf16-true or 32-true"
REPLACING = (BitsandbytesPrecision, TransformerEnginePrecision)


class WeightsAlone(Precision):
    """A `true` precision as the type of the backbone's weights, and of nothing else.

    Lightning's own casts every buffer of a stage, the sums of its metrics, routers and rotary frequencies among them,
    and is the default type of whatever a step makes: budgets, costs, noise.

    Args:
        precision: one of `TRUE`.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision

    def convert_module(self, module: Any) -> Any:
        """Cast the backbone of a stage."""
        module.cast(TRUE[self.precision])
        return module


def cast_weights(model: Module, dtype: torch.dtype) -> None:
    """Give a network's parameters a type; its buffers, such as rotary frequencies, keep theirs."""
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def check_precision(precision: str, plugins: Iterable[Any], *, fitting: bool) -> None:
    """Refuse what a stage cannot do.

    Args:
        precision: as the trainer has it.
        plugins: of the trainer.
        fitting: whether it is to train.

    Raises:
        ValueError: for one that puts layers of its own in place of the elastic ones; in training for fp16, whose loss
            scaling a stage's own update does not do.
    """
    named = [type(each).__name__ for each in plugins if isinstance(each, REPLACING)]
    if precision.startswith("transformer-engine"):
        named.append(f"trainer.precision {precision}")
    if named:
        raise ValueError(f"{named[0]} replaces the layers that are elastic; {INSTEAD}")
    if fitting and precision.startswith("16"):
        raise ValueError(f"trainer.precision {precision} is not supported in training; {INSTEAD}")


def of_weights(plugin: Precision) -> Precision:
    """A plugin of the trainer, or what takes its place: a `true` precision is of the backbone's weights alone."""
    return WeightsAlone(plugin.precision) if isinstance(plugin, HalfPrecision | DoublePrecision) else plugin
