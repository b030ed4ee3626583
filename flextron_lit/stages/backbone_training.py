"""What the stages that train the backbone share: the full network beside parts of itself, on the same batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from flextron_lit import checkpoint as flextron_checkpoint
from flextron_lit.losses.cross_entropy import distillation
from flextron_lit.routers.staleness import stale_files
from flextron_lit.sources import load_dense, resolve_model
from flextron_lit.space import SpaceConfig
from flextron_lit.stages.base import Batch, LossParts, Pass
from flextron_lit.stages.objective import Distillation, FullWeight
from flextron_lit.stages.watched import WatchedStage

WARMUP_SHARE = 0.1
FINAL_LEARNING_RATE = 0.1


class BackboneTraining(WatchedStage):
    """Base of elastic training and joint tuning.

    Each step: the full network's forward, forward and backward of everything that is planned, the full network's
    backward, one update.

    Args:
        checkpoint: where the network comes from.
        distillation: KL terms beside the language loss.
        full_weight: weight of the full network's loss over the run; that of a smaller one is 1.
        optimizer: of the backbone.
        lr_scheduler: any schedule, stepped at every update; None warms up over a tenth of the steps and falls as a
            cosine to a tenth of the learning rate.
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
        *,
        distillation: Distillation,
        full_weight: FullWeight,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        attn_implementation: str,
        activation_checkpointing: bool,
        clip_norm: float,
        accumulate: int,
    ) -> None:
        super().__init__(
            checkpoint,
            attn_implementation=attn_implementation,
            activation_checkpointing=activation_checkpointing,
            clip_norm=clip_norm,
            accumulate=accumulate,
        )
        self.distillation = distillation
        self.full_weight = full_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._original: tuple[PreTrainedModel, ...] = ()

    # --- set-up -------------------------------------------------------------------------------------------------

    def load_trainable(self, space: SpaceConfig | None) -> None:
        """Load the backbone as a part of this module, and the frozen original if something is distilled from it."""
        self.load_backbone(space)
        if self.activation_checkpointing:
            self.backbone.enable_activation_checkpointing()
        self.model = self.backbone.model.train()
        rank_zero_info(self.backbone.summary())
        if self.distillation.from_original and self.trainer.state.fn == "fit":
            # in a tuple, so that it is no part of this module: not trained, not saved, not wrapped
            original = load_dense(self.checkpoint, attn_implementation=self.attn_implementation)
            self._original = (original.requires_grad_(False),)

    def configure_optimizers(self) -> Any:
        """The backbone's optimizer and schedule.

        Raises:
            ValueError: for a schedule that waits for a metric.
        """
        optimizer = self.optimizer(self.model.parameters())
        if self.lr_scheduler is None:
            steps = self.planned_updates()
            scheduler: Any = get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, max(1, round(WARMUP_SHARE * steps)), steps, min_lr_rate=FINAL_LEARNING_RATE
            )
        else:
            scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau waits for a metric; take a schedule that is stepped at every update")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def planned_updates(self) -> int:
        """Updates of the whole run.

        Raises:
            ValueError: if it has no end.
        """
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        batches = self.trainer.estimated_stepping_batches
        if batches == float("inf"):
            raise ValueError("the schedule needs to know the end: set trainer.max_steps or trainer.max_epochs")
        return max(1, int(batches) // self.accumulate)

    # --- training -----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Bring the frozen original to the device."""
        for original in self._original:
            torch.nn.Module.to(original, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Full forward, what is planned forward and backward, full backward: memory holds one graph more."""
        self.check_plan()
        space = self.backbone.space
        parts = LossParts()
        original = self._original_logits(batch)
        with self.backbone.use(space.full()):
            full = Pass(space.full(), batch, self.logits(batch))
            full_loss = self._full_loss(full, original, parts)
        last = (self.trainer.fit_loop.total_batch_idx + 1) % self.accumulate == 0
        with self.no_sync():
            trained = dict(chain.from_iterable(self.train_planned(p, full, original, parts) for p in self.plan))
            if not last:
                self.train_full(full_loss)
        if last:
            self.train_full(full_loss)
        self.tokens_seen += batch["input_ids"].numel() * self.trainer.world_size
        if last:
            norms = self.update({"the full network": full_loss.detach(), **trained})
            self._log_step(parts, norms)

    def train_planned(
        self, planned: Any, full: Pass, original: Tensor | None, parts: LossParts
    ) -> Iterator[tuple[str, Tensor]]:
        """Forward and backward of what one entry of the plan stands for: what to call each pass, and its loss."""
        raise NotImplementedError

    @torch.no_grad()
    def _original_logits(self, batch: Batch) -> Tensor | None:
        for original in self._original:
            return original(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return None

    def _full_loss(self, full: Pass, original: Tensor | None, parts: LossParts) -> Tensor:
        loss = self.language_loss(full, "full", parts)
        return loss + self._distilled(full, "full/kl_original", original, self.distillation.full_from_original, parts)

    def train_full(self, loss: Tensor) -> None:
        """The full network's backward."""
        progress = 0.0 if self.full_weight.constant else self.trainer.global_step / max(1, self.planned_updates() - 1)
        # checkpointed activations are recomputed in backward, so the selection must be the one of the forward
        with self.backbone.use(self.backbone.space.full()):
            self.manual_backward(loss * (self.full_weight.at(progress) / self.accumulate))

    def smaller_loss(self, done: Pass, name: str, full: Pass, original: Tensor | None, parts: LossParts) -> Tensor:
        """Loss of a pass that is not the full network's; its parts are logged under a name."""
        weights = self.distillation
        loss = self.language_loss(done, name, parts, weights.language)
        loss = loss + self._distilled(done, f"{name}/kl_full", full.logits, weights.sampled_from_full, parts)
        return loss + self._distilled(done, f"{name}/kl_original", original, weights.sampled_from_original, parts)

    def _distilled(
        self, done: Pass, name: str, teacher: Tensor | None, weight: float, parts: LossParts
    ) -> Tensor | float:
        if not weight:
            return 0.0
        assert teacher is not None
        term = distillation(done.logits, teacher, done.batch["labels"], self.distillation.temperature)
        parts.add(name, term)
        return weight * term

    def _log_step(self, parts: LossParts, norms: dict[str, Tensor]) -> None:
        means = parts.means()
        metrics: dict[str, Any] = means | norms | self.rates()
        self.log_step({f"train/{name}": value for name, value in metrics.items()})
        self.log_dict({name: v for name, v in means.items() if name.endswith("/loss")}, prog_bar=True, logger=False)

    def rates(self) -> dict[str, float]:
        """The learning rate, for the log."""
        return {"learning_rate": self.schedulers[0].get_last_lr()[0]}

    # --- what is kept -------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """What the checkpoint that the stage started from knew of its weights: kept, and marked as stale."""
        if not self.history:
            return {}
        folder = resolve_model(self.checkpoint)
        space = flextron_checkpoint.read(folder).space
        # choices of another space would mean other widths
        return stale_files(folder, space, type(self).__name__) if space == self.backbone.space else {}

    def settings(self) -> dict[str, Any]:
        """As for every stage, with those of training a backbone."""
        optimizers: Any = self.optimizers()
        first = optimizers[0] if isinstance(optimizers, list) else optimizers
        return super().settings() | {
            "clip_norm": self.clip_norm,
            "accumulate": self.accumulate,
            "full_weight": asdict(self.full_weight),
            "distillation": asdict(self.distillation),
            "optimizer": described(first),
        }


def described(optimizer: LightningOptimizer) -> dict[str, Any]:
    """An optimizer's class and numbers, JSON-able."""
    defaults = {k: v for k, v in optimizer.defaults.items() if isinstance(v, int | float | bool | str)}
    return {"class": type(optimizer.optimizer).__name__, **defaults}
