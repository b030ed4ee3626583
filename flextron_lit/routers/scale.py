"""The scale of what the elastic blocks read."""

from __future__ import annotations

import torch
from torch import Tensor

from flextron_lit.elastic.selection import Policy
from flextron_lit.space import ElasticSpace


class InputScale(Policy):
    """A policy that runs the full network and keeps the moments of every block's input.

    Args:
        space: the choices.
    """

    def __init__(self, space: ElasticSpace) -> None:
        self.full = space.full()
        self.moments: dict[int, tuple[Tensor, Tensor]] = {}

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """The full width for every token, [B, T]."""
        flat = hidden_states.float().flatten(0, -2)
        self.moments[block] = flat.mean(0), flat.std(0)
        return torch.full(hidden_states.shape[:-1], self.full.choices[block], device=hidden_states.device)

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Of every feature of each block's input, [2L, D] each."""
        means, stds = zip(*(self.moments[block] for block in sorted(self.moments)), strict=True)
        return torch.stack(means), torch.stack(stds)
