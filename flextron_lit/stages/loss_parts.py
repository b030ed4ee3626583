"""What the losses of a step are made of."""

import torch
from torch import Tensor


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
