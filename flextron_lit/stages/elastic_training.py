"""Stage 1: elastic continued training of the sorted network (paper, section on elastic continued training)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from flextron_lit.checkpoint import StageRecord
from flextron_lit.costs import parameter_table
from flextron_lit.elastic import importance
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages.backbone_training import BackboneTraining
from flextron_lit.stages.base import LossParts, Pass
from flextron_lit.stages.calibration import Calibration, falling_importance
from flextron_lit.stages.objective import Distillation, FullWeight
from flextron_lit.stages.validation import ValidationSet


class ElasticTraining(BackboneTraining):
    """Sort a dense network by importance, then train it together with sampled sub-networks of itself.

    Each step: the full network's forward, every sampled sub-network's forward and backward, the full network's
    backward, one update. A callback (BudgetSampling) sets the step's sub-networks.

    Routers and a surrogate of a Flextron checkpoint knew the weights that it had: they go along marked as stale.

    Args:
        checkpoint: a dense model, or a Flextron checkpoint to train on.
        space: width choices; the default are those of the checkpoint, or a quarter to all neurons and every KV group.
        calibration: how importance is measured; a Flextron checkpoint is sorted already.
        validation: the sub-networks to watch.
        distillation: KL terms beside the language loss.
        full_weight: weight of the full network's loss over the run; a sampled sub-network's is 1.
        optimizer: any torch optimizer; the default is AdamW without weight decay.
        lr_scheduler: any schedule, stepped at every update; the default warms up over a tenth of the steps and falls
            as a cosine to a tenth of the learning rate.
        attn_implementation: `sdpa` or `eager`.
        activation_checkpointing: recompute activations in backward.
        clip_norm: largest gradient norm of an update.
        accumulate: batches whose gradients add up to one update.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        checkpoint: str,
        space: SpaceConfig | None = None,
        calibration: Calibration = Calibration(),
        validation: ValidationSet = ValidationSet(),
        distillation: Distillation = Distillation(),
        full_weight: FullWeight = FullWeight(),
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        attn_implementation: str = "sdpa",
        activation_checkpointing: bool = False,
        clip_norm: float = 1.0,
        accumulate: int = 1,
    ) -> None:
        super().__init__(
            checkpoint,
            distillation=distillation,
            full_weight=full_weight,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            attn_implementation=attn_implementation,
            activation_checkpointing=activation_checkpointing,
            clip_norm=clip_norm,
            accumulate=accumulate,
        )
        self.space = space
        self.calibration = calibration
        self.validation = validation
        self._calibrated: dict[str, Any] | None = None

    # --- set-up -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load, convert, sort."""
        self.load_trainable(self.space)
        # a resumed run has its sorted weights, and their order, in its state
        if not self.history and self.calibration.tokens and self.trainer.ckpt_path is None:
            self._sort()
        self.costs = parameter_table(self.backbone)
        self.watch(self.validation.resolve(self.backbone.space, self.costs), self.costs)

    def _sort(self) -> None:
        rank_zero_info(f"sorting units by importance on {self.calibration.tokens} training tokens")
        self.model.to(self.trainer.strategy.root_device)
        order = falling_importance(self.backbone, self.text, self.calibration)
        # ranks may sum in another order; they must not permute in one
        self.order = self.trainer.strategy.broadcast(order)
        importance.permute(self.backbone, self.order)
        self._calibrated = asdict(self.calibration)

    # --- training -----------------------------------------------------------------------------------------------

    def train_planned(
        self, planned: SubNetwork, full: Pass, original: Tensor | None, parts: LossParts
    ) -> Iterator[tuple[str, Tensor]]:
        """Forward and backward of a sampled sub-network."""
        with self.backbone.use(planned):
            done = Pass(planned, full.batch, self.logits(full.batch))
            loss = self.smaller_loss(done, "sampled", full, original, parts)
            self.manual_backward(loss / self.accumulate)
        yield str(planned.choices), loss.detach()

    # --- what is kept -------------------------------------------------------------------------------------------

    def record(self) -> StageRecord:
        """As for every stage, with the calibration."""
        return replace(super().record(), calibration=self._calibrated)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the calibration."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flextron"]["calibration"] = self._calibrated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self._calibrated = checkpoint["flextron"]["calibration"]
