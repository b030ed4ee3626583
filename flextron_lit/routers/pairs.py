"""What surrogates learn from: measured pairs of a sub-network and its loss, and what a run has seen last."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.costs.sub_network_sampling import Strategy
from flextron_lit.costs.table import CostTable
from flextron_lit.space import ElasticSpace, SubNetwork

TRIES = 200
ENUMERABLE = 2**14
"""Sub-networks of a space that is small enough to be gone through."""


@dataclass(frozen=True)
class Pairs:
    """Measured pairs, in the order in which they were measured."""

    choices: Tensor
    """int64 [n, 2L]."""
    losses: Tensor
    """Nats per token, float32 [n]."""
    held_out: Tensor
    """Which of them are never trained on, bool [n]."""

    def __len__(self) -> int:
        return len(self.losses)

    @classmethod
    def of(cls, sub_networks: Sequence[SubNetwork], losses: Sequence[float], *, held_out: bool = False) -> Pairs:
        """From what was measured."""
        choices = torch.tensor([sub_network.choices for sub_network in sub_networks])
        return cls(choices, torch.tensor(losses), torch.full((len(losses),), held_out))

    def __add__(self, other: Pairs) -> Pairs:
        mine, theirs = self.tensors(), other.tensors()
        return Pairs(**{name: torch.cat([mine[name], theirs[name]]) for name in mine})

    def select(self, *, held_out: bool) -> Pairs:
        """Those to train on, or those to check with."""
        chosen = self.held_out == held_out
        return Pairs(self.choices[chosen], self.losses[chosen], self.held_out[chosen])

    def one_hot(self, space: ElasticSpace) -> Tensor:
        """Choices as probabilities, [n, 2L, N]."""
        return torch.nn.functional.one_hot(self.choices, space.num_choices).float()

    def tensors(self) -> dict[str, Tensor]:
        """By name, for files."""
        return {"choices": self.choices, "losses": self.losses, "held_out": self.held_out}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Pairs:
        """Inverse of `tensors`."""
        return cls(tensors["choices"].long(), tensors["losses"], tensors["held_out"])


class Memory:
    """What a surrogate that learns during a run has seen last: rows of several tensors, the oldest forgotten first.

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


def draw(
    space: ElasticSpace,
    table: CostTable,
    counts: Sequence[int],
    generator: torch.Generator,
    strategy: Strategy = sampling.stratified,
) -> list[list[SubNetwork]]:
    """Sets of sub-networks to measure, each spread evenly over cost and in random order; none is in two places (ours).

    Args:
        space: the choices.
        table: the cost.
        counts: of each set.
        generator: source of all draws.
        strategy: how a set is drawn; independent draws would cluster at middling costs.

    Raises:
        ValueError: if the space has too few sub-networks.
    """
    known: set[SubNetwork] = set()
    sets = []
    for count in counts:
        spread = strategy(space, table, count, generator)
        fresh = [_fresh(drawn, known, space, table, generator) for drawn in spread]
        sets.append([fresh[i] for i in torch.randperm(count, generator=generator).tolist()])
    return sets


def _fresh(
    drawn: SubNetwork, known: set[SubNetwork], space: ElasticSpace, table: CostTable, generator: torch.Generator
) -> SubNetwork:
    """The sub-network, or another near its cost that is not known yet; notes it as known."""
    ratio = table.ratio(drawn)
    small = space.num_sub_networks <= ENUMERABLE
    for attempt in range(TRIES // 10 if small else TRIES):
        if drawn not in known:
            known.add(drawn)
            return drawn
        # near the ends few sub-networks have just that cost, so look further and further away
        wanted = ratio + (0.5 - float(torch.rand((), generator=generator))) * attempt / TRIES
        drawn = sampling.nearest_to_cost(space, table, min(max(wanted, 0.0), 1.0), generator, tries=1)
    if small and len(known) < space.num_sub_networks:
        # of a space that is nearly used up chance seldom finds the rest
        every = (SubNetwork(each) for each in itertools.product(*(range(len(b.widths)) for b in space.blocks)))
        drawn = min((each for each in every if each not in known), key=lambda each: abs(table.ratio(each) - ratio))
        known.add(drawn)
        return drawn
    raise ValueError(
        f"the space has {space.num_sub_networks} sub-networks, too few for so many different pairs; "
        f"measure fewer than the {len(known)} found"
    )
