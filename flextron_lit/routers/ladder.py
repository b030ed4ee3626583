"""The ladder: what a router answers to about 200 budgets, kept, so that selecting is a look-up (ours)."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flextron_lit.costs import CostTable
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.routers.feasible_decoding import Additive, Bound, Predict, decode, repair
from flextron_lit.routers.static import StaticRouter
from flextron_lit.space import ElasticSpace, SubNetwork

BUDGETS = 200


@dataclass(frozen=True)
class Rung:
    """One sub-network of a ladder."""

    cost: float
    """In the unit of the cost table."""
    loss: float
    """Predicted or measured, in nats per token."""
    sub_network: SubNetwork


@dataclass(frozen=True)
class Ladder:
    """Sub-networks by rising cost and never rising loss: a budget's answer is the last that it pays for.

    So every answer is feasible, more budget never means more loss, and any budget has one, not only trained ones.
    """

    rungs: tuple[Rung, ...]
    measured: bool = False
    """Whether losses come from measurements, on calibration text, rather than from a surrogate."""

    def at(self, limit: float) -> Rung:
        """The best rung that costs no more than a limit, in the table's unit.

        Raises:
            ValueError: if the limit is below the first rung's cost.
        """
        index = bisect_right(self.rungs, limit, key=attrgetter("cost"))
        if not index:
            raise ValueError(f"no sub-network costs {limit:g} or less: the smallest costs {self.rungs[0].cost:g}")
        return self.rungs[index - 1]

    def to_json(self) -> list[dict[str, Any]]:
        """A row a rung, best first."""
        return [{**vars(rung), "sub_network": rung.sub_network.to_json()} for rung in reversed(self.rungs)]

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]], *, measured: bool = False) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError: if there are none, or costs do not rise.
        """
        rungs = [Rung(float(r["cost"]), float(r["loss"]), SubNetwork.from_json(r["sub_network"])) for r in rows]
        if not rungs or any(above.cost <= below.cost for above, below in pairwise(rungs)):
            raise ValueError("the rungs of its ladder do not rise")
        return cls(tuple(rungs[::-1]), measured)


def climb(candidates: Sequence[tuple[float, Rung]], *, measured: bool = False) -> Ladder:
    """Keep the running best: a candidate that costs more than another and is no better is left out.

    Args:
        candidates: what each is compared by. For predicted losses it is what the surrogate says on its own scale: as
            losses in nats, those that it predicts to be no worse than the full network would all be alike.
        measured: whether losses were measured.
    """
    kept: list[Rung] = []
    best = math.inf
    for predicted, rung in sorted(candidates, key=lambda candidate: (candidate[1].cost, candidate[0])):
        if predicted < best:
            best = predicted
            kept.append(rung)
    return Ladder(tuple(kept), measured)


@torch.no_grad()
def build_ladder(
    router: StaticRouter,
    space: ElasticSpace,
    table: CostTable,
    predict: Predict,
    *,
    to_nats: Callable[[Tensor], Tensor],
    full_loss: float,
) -> Ladder:
    """Decode a router's answers to evenly spaced budgets.

    Args:
        router: arg-max of its logits is where decoding starts.
        space: the choices.
        table: the cost that budgets are ratios of.
        predict: the surrogate, on its own scale.
        to_nats: from that scale to a loss in nats per token.
        full_loss: the full network's, which needs no prediction.
    """
    ratios = torch.linspace(table.smallest_ratio, 1.0, BUDGETS, dtype=torch.float64)
    choices = router(ratios.float()).argmax(-1)
    choices, feasible = decode(space, choices, [Bound(table, ratios * table.full)], predict)
    assert feasible.all(), "one bound can always be met by narrowing"
    predicted = predict(torch.nn.functional.one_hot(choices, space.num_choices).float())
    losses: Tensor = to_nats(predicted).clamp(min=full_loss)
    rows = zip(predicted.tolist(), losses.tolist(), _sub_networks(choices), strict=True)
    candidates = [(p, Rung(table.cost(s), loss, s)) for p, loss, s in rows if s != space.full()]
    # nothing is better than the full network by definition, whatever the surrogate says
    return climb([*candidates, (-math.inf, Rung(table.full, full_loss, space.full()))])


@torch.no_grad()
def candidates(
    router: StaticRouter,
    space: ElasticSpace,
    table: CostTable,
    earlier: Ladder,
    excess: ExcessTable | None = None,
    budgets: int = BUDGETS,
) -> list[list[SubNetwork]]:
    """What may become a rung once training has changed the network: two or three series, each by rising cost (ours).

    A router's answers to evenly spaced budgets, narrowed where the router itself minds least: it has learned from the
    network as it is now. The rungs of an earlier ladder, up to the full network: they hold what the surrogate knew of
    the network as it was. And what the excess losses answer, so that no router is behind what needs none: few pairs
    teach a surrogate little, and a search for what it predicts to be best finds its errors.

    Args:
        router: its logits.
        space: the choices.
        table: the cost that budgets are ratios of.
        earlier: holds what it then cost least to lose.
        excess: the excess losses; None where the checkpoint has none.
        budgets: how many.
    """
    ratios = torch.linspace(table.smallest_ratio, 1.0, budgets, dtype=torch.float64)
    rows = zip(ratios, router(ratios.float()), strict=True)
    answers = [narrowed(own, space, Bound(table, ratio[None] * table.full)) for ratio, own in rows]
    series = [answers, [*(rung.sub_network for rung in earlier.rungs), space.full()]]
    if excess is not None:
        full = torch.tensor(space.full().choices).expand(budgets, -1)
        objective = excess.objective(table)
        choices, _ = decode(space, full, [Bound(table, ratios * table.full)], objective)
        series.append(_sub_networks(objective.whole(choices)))
    return [sorted(dict.fromkeys(own), key=table.cost) for own in series]


def worth_measuring(series: Sequence[Sequence[SubNetwork]], count: int) -> list[SubNetwork]:
    """Evenly spaced members of each series, its ends among them: at most `count` together, none twice."""
    each = max(2, count // len(series))
    spaced = (torch.linspace(0, len(own) - 1, min(each, len(own))).round().int().tolist() for own in series)
    return list(dict.fromkeys(own[i] for own, chosen in zip(series, spaced, strict=True) for i in chosen))


def measured_ladder(
    table: CostTable, series: Sequence[Sequence[SubNetwork]], losses: Mapping[SubNetwork, float]
) -> Ladder:
    """The ladder of some series by measured losses, the full network's like any other.

    A member that was not measured counts with the loss that lies between its measured neighbours in the series, by
    cost: rungs that were all measured would be so few that a budget would go unused.

    Args:
        table: the cost that budgets are of.
        series: of sub-networks, each by rising cost; the cheapest that there is must be in one.
        losses: in nats per token, of the ends of every series at least.
    """
    rungs = []
    for own in series:
        known = [each for each in own if each in losses]
        costs, measured = [table.cost(each) for each in known], [losses[each] for each in known]
        between = np.interp([table.cost(each) for each in own], costs, measured).tolist()
        rungs += [Rung(table.cost(each), losses.get(each, loss), each) for each, loss in zip(own, between, strict=True)]
    return climb([(rung.loss, rung) for rung in rungs], measured=True)


def narrowed(logits: Tensor, space: ElasticSpace, bound: Bound) -> SubNetwork:
    """The arg-max of a router's logits [2L, N], narrowed where they fall least, until a bound holds."""
    least = Additive(-logits.masked_fill(~space.exists, 0.0).double())
    (answer,) = _sub_networks(repair(space, logits.argmax(-1)[None], [bound], least))
    return answer


def _sub_networks(choices: Tensor) -> list[SubNetwork]:
    return [SubNetwork(tuple(row)) for row in choices.tolist()]
