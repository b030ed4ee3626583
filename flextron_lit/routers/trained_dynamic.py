"""A trained dynamic router, as a Flextron checkpoint holds it: `routers/dynamic-...`, with the prices of budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from flextron_lit.costs.table import CostTable
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter
from flextron_lit.routers.kept import KeptRouter
from flextron_lit.routers.pricing import Prices
from flextron_lit.space import ElasticSpace


@dataclass(frozen=True)
class TrainedDynamicRouter(KeptRouter):
    """A dynamic router, the cost table it belongs to, and the prices of its budgets."""

    kind: ClassVar[str] = "dynamic"
    network: DynamicRouter
    table: CostTable
    prices: Prices
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was trained; JSON-able."""

    def policy(
        self, budgets: Sequence[float], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DynamicPolicy:
        """What chooses for some budgets: one for all sequences, or one for each.

        Raises:
            ValueError: if a budget is below the lowest that can be met.
        """
        prices = [self.prices.at(budget) for budget in budgets]
        return DynamicPolicy(self.network, self.table, budgets, prices, device=device, dtype=dtype)

    def answers(self) -> dict[str, Any]:
        """The prices."""
        return {"prices": self.prices.to_json()}

    @classmethod
    def made(
        cls, about: Mapping[str, Any], table: CostTable, weights: Mapping[str, Tensor], space: ElasticSpace
    ) -> TrainedDynamicRouter:
        """From what its files hold."""
        network = DynamicRouter(space, weights["weight"].shape[-1], weights["budgets"])
        network.load_state_dict(weights)
        return cls(network, table, Prices.from_json(about["prices"]), about["settings"])


def read_dynamic_routers(folder: Path, space: ElasticSpace) -> list[TrainedDynamicRouter]:
    """The dynamic routers of a Flextron checkpoint, each for a cost table of its own.

    Raises:
        ValueError: if a file is damaged, or belongs to another space.
    """
    return TrainedDynamicRouter.read_all(folder, space)
