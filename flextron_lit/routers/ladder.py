"""The ladder: what a router answers to about 200 budgets, kept, so that selecting is a look-up (ours)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flextron_lit.costs import CostTable
from flextron_lit.routers.decoding import Bound, Predict, decode
from flextron_lit.routers.static import StaticRouter
from flextron_lit.space import ElasticSpace, SubNetwork

BUDGETS = 200


@dataclass(frozen=True)
class Rung:
    """One sub-network of a ladder."""

    cost: float
    """In the unit of the cost table."""
    loss: float
    """Predicted, in nats per token."""
    sub_network: SubNetwork


@dataclass(frozen=True)
class Ladder:
    """Sub-networks by rising cost and never rising predicted loss: a budget's answer is the last that it pays for.

    So every answer is feasible, more budget never predicts more loss, and any budget has one, not only trained ones.
    """

    rungs: tuple[Rung, ...]

    def at(self, limit: float) -> Rung:
        """The best rung that costs no more than a limit, in the table's unit.

        Raises:
            ValueError: if the limit is below the first rung's cost.
        """
        index = bisect_right(self._costs, limit)
        if not index:
            raise ValueError(f"no sub-network costs {limit:g} or less: the smallest costs {self._costs[0]:g}")
        return self.rungs[index - 1]

    @cached_property
    def _costs(self) -> list[float]:
        return [rung.cost for rung in self.rungs]

    def to_json(self) -> list[dict[str, Any]]:
        """A row a rung, best first."""
        rows = [{"cost": r.cost, "loss": r.loss, "sub_network": r.sub_network.to_json()} for r in self.rungs]
        return rows[::-1]

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]]) -> Ladder:
        """Inverse of `to_json`."""
        rungs = [Rung(float(r["cost"]), float(r["loss"]), SubNetwork.from_json(r["sub_network"])) for r in rows]
        return cls(tuple(rungs[::-1]))


def climb(candidates: Sequence[tuple[float, Rung]]) -> Ladder:
    """Keep the running best: a candidate that costs more than another and is predicted no better is left out.

    Args:
        candidates: what the surrogate predicts for each, on its own scale: as losses in nats, those that it predicts to
            be no worse than the full network would all be alike.
    """
    kept: list[Rung] = []
    best = math.inf
    for predicted, rung in sorted(candidates, key=lambda candidate: (candidate[1].cost, candidate[0])):
        if predicted < best:
            best = predicted
            kept.append(rung)
    return Ladder(tuple(kept))


@torch.no_grad()
def build_ladder(
    router: StaticRouter,
    space: ElasticSpace,
    table: CostTable,
    predict: Predict,
    *,
    to_nats: Predict,
    full_loss: float,
    budgets: int = BUDGETS,
) -> Ladder:
    """Decode a router's answers to evenly spaced budgets.

    Args:
        router: arg-max of its logits is where decoding starts.
        space: the choices.
        table: the cost that budgets are ratios of.
        predict: the surrogate, on its own scale.
        to_nats: from that scale to a loss in nats per token.
        full_loss: the full network's, which needs no prediction.
        budgets: how many.
    """
    ratios = torch.linspace(table.smallest_ratio, 1.0, budgets, dtype=torch.float64)
    choices = router(ratios.float()).argmax(-1)
    choices, feasible = decode(space, choices, [Bound(table, ratios * table.full)], predict)
    assert feasible.all(), "one bound can always be met by narrowing"
    predicted = predict(torch.nn.functional.one_hot(choices, space.num_choices).float())
    losses: Tensor = to_nats(predicted).clamp(min=full_loss)
    rows = zip(predicted.tolist(), losses.tolist(), _sub_networks(choices), strict=True)
    candidates = [(p, Rung(table.cost(s), loss, s)) for p, loss, s in rows if s != space.full()]
    # nothing is better than the full network by definition, whatever the surrogate says
    return climb([*candidates, (-math.inf, Rung(table.full, full_loss, space.full()))])


def _sub_networks(choices: Tensor) -> list[SubNetwork]:
    return [SubNetwork(tuple(row)) for row in choices.tolist()]
