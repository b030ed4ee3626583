from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flextron_lit.routers.gate import Gate
from flextron_lit.stages import RouterTraining


class SurrogateGuidance(Callback):
    """Trains a router through the surrogate, and only while the surrogate is good enough on what the router chooses.

    Adds the surrogate's prediction to the router's loss. Every `every_n_steps` it looks at losses of the router's own
    choices for random budgets; the surrogate goes on learning from them. The gate compares each with what the surrogate
    predicted before: while the error over the last `window` pairs is too large, the router stands still. For a static
    router each pair is measured, which takes time; a dynamic router's steps give the losses of their tokens.

    Args:
        every_n_steps: steps between two looks.
        pairs: losses a look.
        threshold: squared error over variance below which the router moves.
        hysteresis: it stops above `threshold * hysteresis`.
        window: pairs that count.
        weight: of the predicted loss, in standard deviations.
        seed: of the budgets and choices that are measured.

    Raises:
        ValueError: if a number is out of range, or the stage is not a router's.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        pairs: int = 4,
        threshold: float = 0.1,
        hysteresis: float = 1.5,
        window: int = 16,
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        if every_n_steps < 1 or pairs < 1 or weight <= 0:
            raise ValueError(
                "every_n_steps and pairs must be 1 or more (without pairs a closed gate stays closed) and weight above "
                f"0, not {every_n_steps}, {pairs}, {weight}"
            )
        self.every_n_steps = every_n_steps
        self.pairs = pairs
        self.weight = weight
        self.gate = Gate(threshold, hysteresis, window)
        self.generator = torch.Generator().manual_seed(seed)
        self._was_open: bool | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Add the loss term."""
        if stage != "fit":
            return
        if not isinstance(pl_module, RouterTraining):
            raise ValueError(f"SurrogateGuidance guides a router, but the stage is {type(pl_module).__name__}")
        pl_module.guide_by_surrogate()
        pl_module.add_loss_term("predicted_loss", pl_module.predicted, self.weight)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure when due, then open or close the gate."""
        assert isinstance(pl_module, RouterTraining)
        due = trainer.global_step % self.every_n_steps == 0
        count = self.gate.wanted if self.gate.wanted else self.pairs * due
        if count:
            self.gate.observe(pl_module.observe(count, self.generator))
        pl_module.router_moves = self.gate.open
        if self.gate.error is not None and self.gate.open != self._was_open:
            self._was_open = self.gate.open
            state = "open, the router moves" if self.gate.open else "closed, only the surrogate learns"
            rank_zero_info(f"gate {state} (squared error over variance {self.gate.error:.3f})")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the gate."""
        assert isinstance(pl_module, RouterTraining)
        metrics = {"train/gate_open": float(self.gate.open), "train/pairs": float(pl_module.observed)}
        if self.gate.error is not None:
            metrics["train/gate_error"] = self.gate.error
        pl_module.log_step(metrics)

    def state_dict(self) -> dict[str, Any]:
        """The gate, and the generator."""
        return {"gate": self.gate.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.gate.load_state_dict(state_dict["gate"])
        self.generator.set_state(state_dict["generator"])
