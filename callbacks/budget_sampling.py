from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.costs.sub_network_sampling import STRATEGIES, draw
from flextron_lit.routers.excess import SPREAD
from flextron_lit.stages import Stage

DEFAULT = {"independent": 0.75, "uniform": 0.25}
COST = "parameters"
EXCESS = "excess"


class BudgetSampling(Callback):
    """Which sub-networks or budgets a step trains: sets `stage.plan` before every batch.

    Elastic training gets sub-networks, beside the full network; a router gets budgets, one from each of k equal ranges
    between the smallest cost ratio and 1. All ranks draw the same, and a resumed run draws what an uninterrupted one
    would.

    Args:
        k: sub-networks or budgets a step.
        strategies: how a step draws sub-networks, with the share of the steps that do so: `independent` (every block
            for itself), `uniform` (all layers alike), `stratified` (evenly over cost), `sandwich` (the smallest, the
            others independent), `excess` (such as budgets get, by the excess losses that conversion computed). None
            means what our comparison found best (docs/experiments.md).
        cost: what `stratified` and `excess` are even over: a counted cost, or with LatencyProfiling `latency`,
            `prefill`, `decode`; None means `parameters`. A router's budgets are of the router's own cost.
        seed: seed of the draws.
        spread: of `excess`: how far around the sub-networks that are best by these losses it draws, as the standard
            deviation of the logarithms of random factors that the losses are multiplied by; 0 draws the best ones
            alone, so that what budgets get learns most (ours; docs/experiments.md). None means 0.5.
        budgets: of `excess`: the ratios of `cost` that are asked for later, to draw from these alone; one that stands
            there twice is drawn twice as often. None means all between the smallest and 1.

    Raises:
        ValueError: if a number is out of range, a strategy does not exist, or an option has no effect on the stage.
    """

    def __init__(
        self,
        k: int = 1,
        strategies: dict[str, float] | None = None,
        cost: str | None = None,
        seed: int = 0,
        spread: float | None = None,
        budgets: list[float] | None = None,
    ) -> None:
        if k < 1:
            raise ValueError(f"k counts sub-networks or budgets a step and must be 1 or more, not {k}")
        self.k = k
        self.given = any(each is not None for each in (strategies, cost, spread, budgets))
        self.strategies = dict(DEFAULT if strategies is None else strategies)
        known = (*STRATEGIES, EXCESS)
        unknown = sorted(set(self.strategies) - set(known))
        if unknown:
            raise ValueError(f"there is no strategy {unknown[0]!r}; there are {', '.join(known)}")
        if not self.strategies or min(self.strategies.values()) <= 0:
            raise ValueError(f"strategies need shares above 0, not {self.strategies}; leave a strategy out instead")
        if spread is not None and (EXCESS not in self.strategies or spread < 0):
            have = ", ".join(self.strategies)
            raise ValueError(f"spread must be 0 or more, for the strategy {EXCESS}, not {spread} for {have}")
        if budgets is not None and (
            EXCESS not in self.strategies or not budgets or not 0 < min(budgets) <= max(budgets) <= 1
        ):
            have = ", ".join(self.strategies)
            raise ValueError(
                f"budgets are ratios above 0 and up to 1, for the strategy {EXCESS}, not {budgets} for {have}"
            )
        self.spread = SPREAD if spread is None else spread
        self.budgets = budgets
        self.cost = COST if cost is None else cost
        self.generator = torch.Generator().manual_seed(seed)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what would have no effect."""
        assert isinstance(pl_module, Stage)
        if pl_module.plans == "budgets" and self.given:
            raise ValueError(
                "strategies, cost, spread and budgets of callbacks.BudgetSampling draw sub-networks, but this stage "
                "trains on budgets of its own cost; leave them out"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what the network cannot do, and say what it cannot do to the full."""
        assert isinstance(pl_module, Stage)
        if pl_module.plans == "sub-networks" and EXCESS in self.strategies and pl_module.excess is None:
            raise ValueError(
                "the strategy excess of callbacks.BudgetSampling goes by excess losses, and this network has none: "
                "convert it anew with calibration.excess_tokens above 0, or take another strategy"
            )
        if pl_module.plans == "sub-networks" and self.budgets is not None:
            smallest = pl_module.cost_table(self.cost).smallest_ratio
            if min(self.budgets) < smallest:
                rank_zero_warn(
                    f"no sub-network meets the budget {min(self.budgets)}: the smallest {self.cost} possible is "
                    f"{smallest:.3f} of the full network's; the smallest sub-network is trained in its place"
                )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw this step's sub-networks or budgets."""
        assert isinstance(pl_module, Stage)
        if pl_module.plans == "budgets":
            pl_module.plan = sampling.budgets(pl_module.table.smallest_ratio, self.k, self.generator)
        else:
            table = pl_module.cost_table(self.cost)
            space, excess = pl_module.backbone.space, pl_module.excess
            others = {} if excess is None else {EXCESS: partial(excess.draw, spread=self.spread, among=self.budgets)}
            pl_module.plan = draw(self.strategies, space, table, self.k, self.generator, {**STRATEGIES, **others})

    def state_dict(self) -> dict[str, Any]:
        """State of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.generator.set_state(state_dict["generator"])
