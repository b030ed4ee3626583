from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flextron_lit.sampling import independent
from flextron_lit.stages import Stage


class BudgetSampling(Callback):
    """Which sub-networks a step trains beside the full network: sets `stage.plan` before every batch.

    All ranks draw the same, and a resumed run draws what an uninterrupted one would.

    Args:
        k: sub-networks a step.
        uniform_share: share of the draws, in 0 to 1, in which all layers take the same choice.
        seed: seed of the draws.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, k: int = 1, uniform_share: float = 0.25, seed: int = 0) -> None:
        if k < 1:
            raise ValueError(f"k counts sub-networks a step and must be 1 or more, not {k}")
        if not 0 <= uniform_share <= 1:
            raise ValueError(f"uniform_share lies in 0 to 1, but is {uniform_share}")
        self.k = k
        self.uniform_share = uniform_share
        self.generator = torch.Generator().manual_seed(seed)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw this step's sub-networks."""
        assert isinstance(pl_module, Stage)
        space = pl_module.backbone.space
        pl_module.plan = [independent(space, self.generator, self.uniform_share) for _ in range(self.k)]

    def state_dict(self) -> dict[str, Any]:
        """State of the generator."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.generator.set_state(state_dict["generator"])
