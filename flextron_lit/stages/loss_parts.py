"""What the losses of a step are made of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flextron_lit.losses.by_chunk import Predictions
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.space import SubNetwork


@dataclass(frozen=True)
class Pass:
    """One forward pass of a step, as a loss term sees it."""

    sub_network: SubNetwork | None
    """The sub-network that ran; None if every token took its own widths."""
    batch: Batch
    """input_ids, position_ids, labels: [B, T]."""
    predictions: Predictions
    """With gradients."""

    @property
    def logits(self) -> Tensor:
        """[B, T, V], with gradients: all at once."""
        return self.predictions.logits


LossTerm = Callable[[Any], Tensor]
"""From what a stage ran (a `Pass`, or what a router answered) to a loss."""


class LossParts:
    """What the losses of a step are made of, for the log: means over the passes that have a part."""

    def __init__(self) -> None:
        self._values: dict[str, list[Tensor]] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Note one pass's value."""
        self._values.setdefault(name, []).append(value.detach())

    def means(self) -> dict[str, Tensor]:
        """Mean of each part."""
        return {name: torch.stack(values).mean() for name, values in self._values.items()}
