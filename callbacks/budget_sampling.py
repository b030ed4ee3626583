from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flextron_lit.sampling import STRATEGIES, draw
from flextron_lit.stages import Stage

DEFAULT = {"independent": 0.75, "uniform": 0.25}


class BudgetSampling(Callback):
    """Which sub-networks a step trains beside the full network: sets `stage.plan` before every batch.

    All ranks draw the same, and a resumed run draws what an uninterrupted one would.

    Args:
        k: sub-networks a step.
        strategies: how a step draws them, with the share of the steps that do so: `independent` (every block for
            itself), `uniform` (all layers alike), `stratified` (evenly over cost), `sandwich` (the smallest, the others
            independent). None means what our comparison found best (docs/experiments.md).
        cost: what `stratified` is even over: `parameters`, or with LatencyProfiling `latency`, `prefill`, `decode`.
        seed: seed of the draws.

    Raises:
        ValueError: if a number is out of range, or a strategy does not exist.
    """

    def __init__(
        self, k: int = 1, strategies: dict[str, float] | None = None, cost: str = "parameters", seed: int = 0
    ) -> None:
        if k < 1:
            raise ValueError(f"k counts sub-networks a step and must be 1 or more, not {k}")
        self.k = k
        self.strategies = dict(DEFAULT if strategies is None else strategies)
        unknown = sorted(set(self.strategies) - set(STRATEGIES))
        if unknown:
            raise ValueError(f"there is no strategy {unknown[0]!r}; there are {', '.join(STRATEGIES)}")
        if not self.strategies or min(self.strategies.values()) <= 0:
            raise ValueError(f"strategies need shares above 0, not {self.strategies}; leave a strategy out instead")
        self.cost = cost
        self.generator = torch.Generator().manual_seed(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw this step's sub-networks."""
        assert isinstance(pl_module, Stage)
        table = pl_module.cost_table(self.cost)
        pl_module.plan = draw(self.strategies, pl_module.backbone.space, table, self.k, self.generator)

    def state_dict(self) -> dict[str, Any]:
        """State of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.generator.set_state(state_dict["generator"])
