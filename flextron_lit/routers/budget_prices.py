"""What a unit of cost is worth at a budget, so that a dynamic router's mean cost meets it (ours; method 6).

Training asks a router to keep to its budget, by a penalty, but does not make it. So at inference a token takes the
arg-max of `logits - price * cost`: one number for all tokens moves their mean cost, and which of them get more is still
for the logits to say. The price of a budget is found by bisection on a calibration mix and stored; between stored
budgets it is interpolated.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import ceil
from typing import Any, Self

import numpy as np

from flextron_lit.costs.table import CostTable

TOLERANCE = 0.003
"""Largest relative distance of the mean cost reached from the budget."""
TRIES = 20
LARGEST = 1e4
MARGIN = 0.02
EDGE = 0.1
"""Of a bracket, never looked at."""


@dataclass(frozen=True)
class Priced:
    """A budget with its price."""

    budget: float
    """Mean cost asked for, as a ratio of the full network's."""
    price: float
    """In logits per hundredth of the full network's cost."""
    ratio: float
    """Mean cost reached on the calibration mix."""
    loss: float
    """Nats per token on the calibration mix."""


@dataclass(frozen=True)
class Prices:
    """Budgets by rising cost, each with its price."""

    rows: tuple[Priced, ...]

    def at(self, budget: float) -> float:
        """The price of any budget between the lowest and the highest stored, in logits per hundredth of the full cost.

        Raises:
            ValueError: if the budget is below the lowest.
        """
        if budget < self.rows[0].budget:
            # rounded up, so that what it names is met
            lowest = ceil(1000 * self.rows[0].budget) / 1000
            raise ValueError(
                f"the dynamic router meets budgets of {lowest:.3f} and more, not {budget:g}: every token needs the "
                "keys and values of all others; take a static router for less"
            )
        budgets, prices = zip(*((row.budget, row.price) for row in self.rows), strict=True)
        return float(np.interp(budget, budgets, prices))

    def to_json(self) -> list[dict[str, float]]:
        """A row a budget."""
        return [asdict(row) for row in self.rows]

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError: if there are none, or budgets do not rise.
        """
        priced = tuple(Priced(**{name: float(value) for name, value in row.items()}) for row in rows)
        if not priced or any(low.budget >= high.budget for low, high in pairwise(priced)):
            raise ValueError("the budgets of its prices do not rise")
        return cls(priced)


def margin(table: CostTable) -> float:
    """Cost ratios left out at both ends of a table's range: there a price is not determined."""
    return MARGIN * (table.largest_ratio - table.smallest_ratio)


def spendable(budget: float, table: CostTable) -> float:
    """A budget, or nearly all that can be spent where it is above that."""
    return min(budget, table.largest_ratio - margin(table))


def evenly_spaced(table: CostTable, count: int) -> list[float]:
    """Budgets over the whole range of a table, none above 1."""
    low, high = table.smallest_ratio, min(1.0, table.largest_ratio)
    step = (high - low - 2 * margin(table)) / (count - 1)
    return [low + margin(table) + index * step for index in range(count)]


def solve(mean_cost: Callable[[float], float], target: float, guess: float = 0.0, step: float = 0.5) -> float:
    """The price at which a mean cost meets a target: it falls as the price rises.

    Brackets the target from the guess on, then narrows the bracket: where a straight line through its ends says, but
    never too close to an end, and in the middle by turns, so that a step in the cost does not hold it up. Where the
    cost jumps over the target, as that of a router that does not tell tokens apart, the price is the one just past the
    jump: a budget is a limit.

    Args:
        mean_cost: price to mean cost ratio; each call runs the network.
        target: wanted ratio.
        guess: where to start.
        step: first step away from it; doubled until the target is bracketed.

    Raises:
        ValueError: if no price reaches the target; the message names what was reached.
    """
    ends: dict[bool, tuple[float, float]] = {}  # True: too dear, so the price has to rise

    def meets(price: float) -> bool:
        found = mean_cost(price)
        ends[found > target] = price, found
        return abs(found - target) <= TOLERANCE * target

    if meets(guess):
        return guess
    price, sign = guess, 1 if True in ends else -1
    while len(ends) < 2:
        if step > LARGEST:
            ((_, found),) = ends.values()
            raise ValueError(f"no price makes the dynamic router's mean cost {target:.3f}: the nearest is {found:.3f}")
        price += sign * step
        if meets(price):
            return price
        step *= 2
    for number in range(TRIES):
        (low, dear), (high, cheap) = ends[True], ends[False]
        share = 0.5 if number % 2 else min(max((dear - target) / (dear - cheap), EDGE), 1 - EDGE)
        price = low + share * (high - low)
        if meets(price):
            return price
    return ends[False][0]
