"""From a budget to an answer: by what a Flextron checkpoint holds, without measuring anything.

Static routers, the surrogate and the table of excess losses answer with a sub-network for all tokens, dynamic routers
with what chooses for every token.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from flextron_lit.costs.budget import Limit, Limits, meets, parse_budget
from flextron_lit.costs.dynamic import refuse_constant
from flextron_lit.costs.table import CostTable
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.routers.feasible_decoding import Bound, Predict, decode
from flextron_lit.routers.in_force import in_force
from flextron_lit.routers.search import fit
from flextron_lit.routers.staleness import stale_note
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter, TrainedSurrogate
from flextron_lit.space import ElasticSpace, SubNetwork

Budget = str | float
ADAPTER = "an adapter"
"""What has changed a network that carries one."""
STARTS = 16


@dataclass(frozen=True)
class Answer:
    """What a budget gets."""

    sub_network: SubNetwork
    how: str
    """Where it comes from, in words."""
    loss: float | None
    """In nats per token on the text that the surrogate learned from, or that the ladder was measured on; None for the
    full network, and where nothing predicts it."""
    measured: bool = False
    """Whether the loss was measured when the ladder was made, rather than predicted by a surrogate."""
    may_miss: Mapping[str, float] = field(default_factory=dict)
    """By how much the latencies that were limited may miss what their table says, by name, as a share of the full
    network's: the largest miss that was seen when the table was checked. Nothing for counted costs."""


@dataclass(frozen=True)
class Routing:
    """The routers and the surrogate of a checkpoint, with the cost tables that hold here."""

    space: ElasticSpace
    tables: Mapping[str, CostTable]
    routers: Mapping[str, TrainedRouter]
    """By the sha256 of the cost table that each belongs to."""
    surrogate: TrainedSurrogate | None
    excess: ExcessTable | None = None
    """What conversion computed: the answer of a checkpoint that has neither router nor surrogate."""
    may_miss: Mapping[str, float] = field(default_factory=dict)
    """By how much each measured latency may miss its table (`LatencyTable.may_miss`)."""

    @property
    def answers(self) -> bool:
        """Whether there is anything to answer budgets with."""
        return bool(self.routers or self.surrogate or self.excess)

    @classmethod
    def read(
        cls,
        folder: Path,
        space: ElasticSpace,
        tables: Mapping[str, CostTable],
        may_miss: Mapping[str, float] | None = None,
    ) -> Self:
        """What a Flextron checkpoint holds.

        Args:
            folder: the checkpoint.
            space: its choices.
            tables: the costs that hold here.
            may_miss: of those that were measured, as `LatencyTable.may_miss` says it.

        Raises:
            ValueError: if a file is damaged, or belongs to another space.
        """
        routers = {router.table.sha256: router for router in TrainedRouter.read_all(folder, space)}
        surrogate, excess = TrainedSurrogate.read(folder, space), ExcessTable.read(folder, space)
        return cls(space, tables, routers, surrogate, excess, may_miss or {})

    def stale_since(self, change: str) -> Self:
        """The same, of a network that something has changed."""
        routers = {sha256: router.stale_since(change) for sha256, router in self.routers.items()}
        return replace(self, routers=routers, surrogate=self.surrogate and self.surrogate.stale_since(change))

    def parse(self, budget: Budget) -> list[Limit]:
        """Read a budget; a ratio without a name is of the one cost that there is a router for.

        Raises:
            ValueError: as `parse_budget`.
        """
        usable = {router.table.name for router in self.routers.values() if router.table.name in self.tables}
        return parse_budget(str(budget), self.tables, usable.pop() if len(usable) == 1 else None)

    def answer(self, limits: Limits) -> Answer | None:
        """The sub-network for some limits: a look-up if a router was trained for them, else a search.

        The search goes by the surrogate, or, before there is one, by the table of excess losses.

        Returns:
            None if the checkpoint has nothing to answer with.

        Raises:
            ValueError: if no sub-network that was tried meets all limits at once.
        """
        if all(limit.loose for limit in limits):
            return Answer(self.space.full(), "the full network meets it", None)
        found = self._found(limits)
        return found and replace(found, may_miss=self.misses(limits))

    def misses(self, limits: Limits) -> dict[str, float]:
        """By how much what limits allow may miss them: measured latencies alone."""
        names = [limit.table.name for limit in limits]
        return {name: self.may_miss[name] for name in names if name in self.may_miss}

    def _found(self, limits: Limits) -> Answer | None:
        """An answer to limits that the full network does not meet."""
        router = self.routers.get(limits[0].table.sha256) if len(limits) == 1 else None
        if router is not None:
            rung, measured = router.ladder.at(limits[0].value), router.ladder.measured
            how = f"a look-up in the ladder of the router for {router.table.name}"
            how += ", with losses that were measured" if measured else ""
            return Answer(rung.sub_network, how + _warned("router", router.stale), rung.loss, measured)
        if self.surrogate is not None:
            best, predicted = self._searched(limits, self.surrogate.network)
            how = f"a search by the surrogate, since {self._why(limits)}{_warned('surrogate', self.surrogate.stale)}"
            return Answer(best, how, float(self.surrogate.to_nats(predicted)))
        if self.excess is not None:
            how = "a search by the excess losses that conversion computed, since there is no router and no surrogate"
            objective = self.excess.objective(limits[0].table)
            return Answer(self._searched(limits, objective, objective.whole)[0], how, None)
        return None

    @torch.no_grad()
    def _searched(
        self, limits: Limits, predict: Predict, completed: Callable[[Tensor], Tensor] = lambda choices: choices
    ) -> tuple[SubNetwork, Tensor]:
        """The best of several starts, each narrowed to the limits and widened where it helps; what is predicted of it.

        Args:
            limits: of the budget.
            predict: what is to be small.
            completed: choices, narrowed further where it has to be.

        Raises:
            ValueError: if none of them meets all limits at once.
        """
        starts = list(self._starts(limits))
        choices = torch.tensor([start.choices for start in starts])
        bounds = [Bound(limit.table, torch.full((len(starts),), limit.value).double()) for limit in limits]
        choices, _ = decode(self.space, choices, bounds, predict)
        found = [sub for row in completed(choices).tolist() if meets(sub := SubNetwork(tuple(row)), limits)]
        if not found:
            raise ValueError("no sub-network that was tried meets all limits of the budget at once; loosen one")
        one_hot = torch.stack([self.space.one_hot(sub_network) for sub_network in found])
        predicted = predict(one_hot)
        best = int(predicted.argmin())
        return found[best], predicted[best]

    def _starts(self, limits: Limits) -> Sequence[SubNetwork]:
        """The full network, what routers say to each limit alone, and random ones that meet them all."""
        generator = torch.Generator().manual_seed(0)
        known = [(self.routers.get(limit.table.sha256), limit.value) for limit in limits]
        routed = [router.ladder.at(value) for router, value in known if router is not None]
        drawn = [fit(self.space, self.space.random(generator), limits, generator) for _ in range(STARTS)]
        return [self.space.full(), *(rung.sub_network for rung in routed), *(sub for sub in drawn if sub is not None)]

    def _why(self, limits: Limits) -> str:
        if len(limits) > 1:
            return "a router knows one limit, not several"
        name = limits[0].table.name
        if any(router.table.name == name for router in self.routers.values()):
            return (
                f"the router for {name} was trained on another cost table; `python main.py reroute` trains one for this"
            )
        return f"no router was trained for {name}"


def _warned(what: str, stale: str | None) -> str:
    return f"; {stale_note(f'this {what}', stale)}" if stale else ""


@dataclass(frozen=True)
class DynamicRouting:
    """The dynamic routers of a checkpoint."""

    routers: Mapping[str, TrainedDynamicRouter]
    """By the name of the cost that each was trained for."""

    @classmethod
    def read(cls, folder: Path, space: ElasticSpace) -> Self:
        """What a Flextron checkpoint holds.

        Raises:
            ValueError: if it has no dynamic router, or several for one cost, or a file is damaged.
        """
        routers: dict[str, TrainedDynamicRouter] = {}
        for router in in_force(TrainedDynamicRouter.read_all(folder, space), folder, space):
            if router.table.name in routers:
                raise ValueError(
                    f"{folder} holds several dynamic routers for {router.table.name}, of different cost tables "
                    f"({routers[router.table.name].name}, {router.name}); delete the files of those not meant for here"
                )
            routers[router.table.name] = router
        if not routers:
            raise ValueError(
                f"{folder} holds no dynamic router: train one (configs/stages/dynamic_router.yaml), or set a static "
                "budget"
            )
        return cls(routers)

    def answer(self, budgets: Budget | Sequence[Budget], backbone: ElasticBackbone) -> SubNetwork | DynamicPolicy:
        """What to make active for a budget, or for one budget a sequence of the batch.

        Args:
            budgets: ratios of the full network's cost (0.7), or as on the command line, with one limit each:
                `flops=0.7`, `prefill=300ms`.
            backbone: where it will run.

        Returns:
            The full network if one budget is asked for and it meets it, else what chooses for every token.

        Warns:
            UserWarning: if the network has changed since the router was trained.

        Raises:
            ValueError: if a budget cannot be read or met, or is of a cost that no choice of a dynamic router changes.
        """
        each = isinstance(budgets, Sequence) and not isinstance(budgets, str)
        asked: Sequence[Any] = budgets if each else [budgets]  # type: ignore[assignment]
        limits = [self._limit(budget) for budget in asked]
        names = {limit.table.name for limit in limits}
        if len(names) > 1:
            raise ValueError(f"the budgets of one batch must be of one cost, not of {', '.join(sorted(names))}")
        if not each and limits[0].loose:
            return backbone.space.full()
        router = self.routers[names.pop()]
        stale = router.stale or (ADAPTER if backbone.adapted else None)
        if stale:
            warnings.warn(stale_note(f"the dynamic router for {router.table.name}", stale), stacklevel=2)
        ratios = [limit.value / limit.table.full for limit in limits]
        return router.policy(ratios, device=backbone.model.device, dtype=backbone.model.dtype)

    def _limit(self, budget: Budget) -> Limit:
        tables = {name: router.table for name, router in self.routers.items()}
        name = str(budget).partition("=")[0].rstrip("< ")
        refuse_constant(name)
        limits = parse_budget(str(budget), tables, next(iter(tables)) if len(tables) == 1 else None)
        if len(limits) > 1:
            raise ValueError(f"a dynamic router keeps one limit, not {len(limits)}: {budget}")
        return limits[0]


@dataclass(frozen=True)
class Selection:
    """What `select` answers."""

    budget: str
    sub_network: SubNetwork
    how: str
    """The search, and what it went by."""
    loss: float | None
    """Measured, in nats per token; None where nothing was measured."""
    predicted: float | None = None
    """Predicted by the surrogate, in nats per token; None where it was not asked."""
    calibrated: float | None = None
    """Measured when the router's ladder was made, in nats per token; None where its losses are predicted."""
    may_miss: Mapping[str, float] = field(default_factory=dict)
    """As of an `Answer`."""


def to_json(selection: Selection, space: ElasticSpace, tables: Mapping[str, CostTable]) -> dict[str, Any]:
    """An answer, for scripts."""
    sub_network = selection.sub_network
    widths = zip(space.blocks, space.widths(sub_network), strict=True)
    return {
        "budget": selection.budget,
        "how": selection.how,
        "loss": selection.loss,
        "predicted_loss": selection.predicted,
        "calibration_loss": selection.calibrated,
        "may_miss": dict(selection.may_miss),
        "sub_network": sub_network.to_json(),
        "widths": {block.name: width for block, width in widths},
        "costs": {
            name: {"cost": table.cost(sub_network), "unit": table.unit, "ratio": table.ratio(sub_network)}
            for name, table in tables.items()
        },
    }
