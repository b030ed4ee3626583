"""What is not a number stops a run: a loss or gradient before it reaches the weights, weights before they are kept."""

from collections.abc import Iterable

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A loss, gradient or weight that is not a number, met before it did harm."""


def check_finite(value: Tensor, step: int, what: str, more: str = "") -> None:
    """Stop before the update if a loss or gradient is not a number.

    Args:
        value: a number.
        step: updates made so far.
        what: the value is, in words.
        more: what else there is to say of it.

    Raises:
        NonFiniteError: naming the step.
    """
    if not torch.isfinite(value):
        raise NonFiniteError(
            f"stopped before the update of step {step + 1}: {what} is {value.item()}{more}. The weights are those "
            f"of step {step}; lower the learning rate, or look at the text of this step"
        )


def check_weights(weights: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Keep weights that are not numbers from being written as what a run led to.

    Args:
        weights: by name.
        step: updates made so far.

    Raises:
        NonFiniteError: naming the first.
    """
    lost = [name for name, weight in weights if not torch.isfinite(weight).all()]
    if lost:
        raise NonFiniteError(
            f"no checkpoint is written: after step {step} the run's {lost[0]} holds values that are not numbers"
            f"{f', and {len(lost) - 1} others do' if lost[1:] else ''}; start anew with --fresh and a lower learning "
            "rate"
        )
