"""A loss or gradient that is not a number stops the run before it reaches the weights."""

import torch
from torch import Tensor


class NonFiniteError(ValueError):
    """A loss or gradient that is not a number, met before it reached the weights."""


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
