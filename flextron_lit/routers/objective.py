"""What a static router minimises: the loss that a guide predicts or measures, plus a penalty on the cost (paper)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_lit.costs.table import CostTable
from flextron_lit.routers.noise import gumbel_noise, straight_through
from flextron_lit.routers.static import StaticRouter
from flextron_lit.space import SubNetwork


@dataclass(frozen=True, kw_only=True)
class CostPenalty:
    """`weight x |cost - budget|`, both as ratios of the full network's cost."""

    weight: float = 20.0
    """Lambda. Against a predicted loss in standard deviations (through the backbone: in nats), so 20 means that a
    hundredth of the cost is worth a fifth of one."""
    one_sided: bool = True
    """Only what exceeds the budget counts (ours: the loss asks for more cost by itself); False: the paper's."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"penalty.weight must be above 0, not {self.weight}: the router would ignore its budget")

    def of(self, ratios: Tensor, budgets: Tensor) -> Tensor:
        """Mean over [B] budgets."""
        gap = ratios - budgets
        return self.weight * (gap.clamp(min=0) if self.one_sided else gap.abs()).mean()


@dataclass(frozen=True)
class Routed:
    """What a router answered to the budgets of a step, as a loss term sees it."""

    budgets: Tensor
    """Cost ratios, [B]."""
    logits: Tensor
    """[B, 2L, N]."""
    probabilities: Tensor
    """[B, 2L, N], one-hot in value, with the gradients of the soft choices."""

    @property
    def sub_networks(self) -> list[SubNetwork]:
        """The hard choices."""
        return [SubNetwork(tuple(row)) for row in self.probabilities.argmax(-1).tolist()]

    def ratios(self, table: CostTable) -> Tensor:
        """Cost ratios of the hard choices [B], with gradients."""
        return (table.expected(self.probabilities) / table.full).to(self.budgets.dtype)


def route(router: StaticRouter, budgets: Tensor, generator: torch.Generator, temperature: float) -> Routed:
    """Random hard choices for some budgets, [B]."""
    logits = router(budgets)
    noise = gumbel_noise(tuple(logits.shape), generator).to(logits.device)
    return Routed(budgets, logits, straight_through(logits, noise, temperature))
