"""Budgets answered by the dynamic routers of a Flextron checkpoint: every token gets its own widths."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flextron_lit.costs.budget import Limit, parse_budget
from flextron_lit.costs.dynamic import refuse_constant
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.selection import Selection
from flextron_lit.routers.staleness import stale_note
from flextron_lit.routers.trained_dynamic import TrainedDynamicRouter, read_dynamic_routers
from flextron_lit.space import ElasticSpace

Budget = str | float


@dataclass(frozen=True)
class DynamicRouting:
    """The dynamic routers of a checkpoint."""

    routers: Mapping[str, TrainedDynamicRouter]
    """By the name of the cost that each was trained for."""

    @classmethod
    def read(cls, folder: Path, space: ElasticSpace) -> DynamicRouting:
        """What a Flextron checkpoint holds.

        Raises:
            ValueError: if it has no dynamic router, or several for one cost, or a file is damaged.
        """
        routers: dict[str, TrainedDynamicRouter] = {}
        for router in read_dynamic_routers(folder, space):
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

    def answer(self, budgets: Budget | Sequence[Budget], backbone: ElasticBackbone) -> Selection:
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
        if router.stale:
            warnings.warn(stale_note(f"the dynamic router for {router.table.name}", router.stale), stacklevel=2)
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
