"""What a surrogate that learns during a run has seen last."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Memory:
    """The last rows of several tensors, the oldest forgotten first.

    Args:
        capacity: rows.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Put rows in: [n, ...] each."""
        for name, rows in columns.items():
            # a resumed run reads its memory back onto the processor
            known = self.columns.get(name, rows[:0]).to(rows.device)
            self.columns[name] = torch.cat([known, rows])[-self.capacity :]

    def sample(self, count: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random rows, [count, ...] each; a row may come twice."""
        chosen = torch.randint(len(self), (count,), generator=generator)
        return {name: rows[chosen.to(rows.device)] for name, rows in self.columns.items()}
