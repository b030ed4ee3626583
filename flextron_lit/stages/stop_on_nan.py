"""What is not a number stops a run: a loss or gradient before it reaches the weights, weights before they are kept."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import Tensor

from flextron_lit.files.ranks import gather


class NonFiniteError(ValueError):
    """A loss, gradient or weight that is not a number, met before it did harm."""


def not_finite(what: str, value: float, step: int, more: str = "") -> str:
    """What to say of a loss or gradient that is not a number.

    Args:
        what: the value is, in words.
        value: what it is.
        step: updates made so far.
        more: what else there is to say of it.
    """
    return (
        f"stopped before the update of step {step + 1}: {what} is {value}{more}. The weights are those of step {step}; "
        "lower the learning rate, or look at the text of this step"
    )


def check_weights(weights: Iterable[tuple[str, Tensor]], step: int, world_size: int = 1) -> None:
    """Keep weights that are not numbers from being written as what a run led to.

    Args:
        weights: by name; of each process those that it holds.
        step: updates made so far.
        world_size: how many processes there are.

    Raises:
        NonFiniteError: naming the first.
    """
    own = [name for name, weight in weights if not torch.isfinite(weight).all()]
    lost = list(dict.fromkeys(chain.from_iterable(gather(own, world_size))))
    if lost:
        raise NonFiniteError(
            f"no checkpoint is written: after step {step} the run's {lost[0]} holds values that are not numbers"
            f"{f', and {len(lost) - 1} others do' if lost[1:] else ''}; start anew with --fresh and a lower learning "
            "rate"
        )
