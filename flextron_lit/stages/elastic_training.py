"""Stage 1: elastic continued training of the sorted network (paper, section on elastic continued training)."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from flextron_lit.checkpoint import StageRecord
from flextron_lit.costs import parameter_table
from flextron_lit.elastic import importance
from flextron_lit.losses import distillation
from flextron_lit.sources import load_dense
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages.calibration import Calibration, falling_importance
from flextron_lit.stages.objective import Distillation, FullWeight
from flextron_lit.stages.stage import Batch, LossParts, Pass
from flextron_lit.stages.watched import WatchedStage
from flextron_lit.validation import ValidationSet

WARMUP_SHARE = 0.1
FINAL_LEARNING_RATE = 0.1


class ElasticTraining(WatchedStage):
    """Sort a dense network by importance, then train it together with sampled sub-networks of itself.

    Each step: the full network's forward, every sampled sub-network's forward and backward, the full network's
    backward, one update. A callback (BudgetSampling) sets the step's sub-networks.

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
            attn_implementation=attn_implementation,
            activation_checkpointing=activation_checkpointing,
            clip_norm=clip_norm,
            accumulate=accumulate,
        )
        self.space = space
        self.calibration = calibration
        self.validation = validation
        self.distillation = distillation
        self.full_weight = full_weight
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self._original: tuple[PreTrainedModel, ...] = ()
        self._calibrated: dict[str, Any] | None = None
        self._last_update = 0.0

    # --- set-up -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load, convert, sort; idempotent."""
        if hasattr(self, "backbone"):
            return
        self.load_backbone(self.space)
        if self.activation_checkpointing:
            self.backbone.enable_activation_checkpointing()
        self.model = self.backbone.model.train()
        rank_zero_info(self.backbone.summary())
        # a resumed run has its sorted weights, and their order, in its state
        if not self.history and self.calibration.tokens and self.trainer.ckpt_path is None:
            self._sort()
        self.costs = parameter_table(self.backbone)
        self.watch(self.validation.resolve(self.backbone.space, self.costs), self.costs)
        if self.distillation.from_original and self.trainer.state.fn == "fit":
            # in a tuple, so that it is no part of this module: not trained, not saved, not wrapped
            original = load_dense(self.checkpoint, attn_implementation=self.attn_implementation)
            self._original = (original.requires_grad_(False),)

    def _sort(self) -> None:
        rank_zero_info(f"sorting units by importance on {self.calibration.tokens} training tokens")
        self.model.to(self.trainer.strategy.root_device)
        order = falling_importance(self.backbone, self.text, self.calibration)
        # ranks may sum in another order; they must not permute in one
        self.order = self.trainer.strategy.broadcast(order)
        importance.permute(self.backbone, self.order)
        self._calibrated = asdict(self.calibration)

    def configure_optimizers(self) -> Any:
        """The optimizer and schedule of the config.

        Raises:
            ValueError: for a schedule that waits for a metric.
        """
        optimizer = self.optimizer(self.model.parameters())
        if self.lr_scheduler is None:
            steps = self._planned_updates()
            scheduler: Any = get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, max(1, round(WARMUP_SHARE * steps)), steps, min_lr_rate=FINAL_LEARNING_RATE
            )
        else:
            scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau waits for a metric; take a schedule that is stepped at every update")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _planned_updates(self) -> int:
        if self.trainer.max_steps > 0:
            return self.trainer.max_steps
        batches = self.trainer.estimated_stepping_batches
        if batches == float("inf"):
            raise ValueError("the default schedule needs to know the end: set trainer.max_steps or trainer.max_epochs")
        return max(1, int(batches) // self.accumulate)

    # --- training -----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Bring the frozen original to the device; start the clock."""
        for original in self._original:
            torch.nn.Module.to(original, self.device)
        self._last_update = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Full forward, sampled sub-networks forward and backward, full backward: memory holds one graph more."""
        if not self.plan:
            raise ValueError(
                "this step has no sub-networks to train: add callbacks.BudgetSampling to trainer.callbacks"
            )
        space = self.backbone.space
        parts = LossParts()
        original = self._original_logits(batch)
        with self.backbone.use(space.full()):
            full = Pass(space.full(), batch, self.logits(batch))
            full_loss = self._full_loss(full, original, parts)
        last = (self.trainer.fit_loop.total_batch_idx + 1) % self.accumulate == 0
        with self.no_sync():
            sampled = {str(s.choices): self._train_sampled(s, full, original, parts) for s in self.plan}
            if not last:
                self._train_full(full_loss)
        if last:
            self._train_full(full_loss)
        self.tokens_seen += batch["input_ids"].numel() * self.trainer.world_size
        if last:
            norm = self.update({"the full network": full_loss.detach(), **sampled})
            self._log_step(parts, norm, batch["input_ids"].numel())

    @torch.no_grad()
    def _original_logits(self, batch: Batch) -> Tensor | None:
        for original in self._original:
            return original(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return None

    def _full_loss(self, full: Pass, original: Tensor | None, parts: LossParts) -> Tensor:
        loss = self.language_loss(full, "full", parts)
        return loss + self._distilled(full, "full/kl_original", original, self.distillation.full_from_original, parts)

    def _train_full(self, loss: Tensor) -> None:
        progress = 0.0 if self.full_weight.constant else self.trainer.global_step / max(1, self._planned_updates() - 1)
        # checkpointed activations are recomputed in backward, so the selection must be the one of the forward
        with self.backbone.use(self.backbone.space.full()):
            self.manual_backward(loss * (self.full_weight.at(progress) / self.accumulate))

    def _train_sampled(self, sub_network: SubNetwork, full: Pass, original: Tensor | None, parts: LossParts) -> Tensor:
        weights = self.distillation
        with self.backbone.use(sub_network):
            done = Pass(sub_network, full.batch, self.logits(full.batch))
            loss = self.language_loss(done, "sampled", parts, weights.language)
            loss = loss + self._distilled(done, "sampled/kl_full", full.logits, weights.sampled_from_full, parts)
            loss = loss + self._distilled(done, "sampled/kl_original", original, weights.sampled_from_original, parts)
            self.manual_backward(loss / self.accumulate)
        return loss.detach()

    def _distilled(
        self, done: Pass, name: str, teacher: Tensor | None, weight: float, parts: LossParts
    ) -> Tensor | float:
        if not weight:
            return 0.0
        assert teacher is not None
        term = distillation(done.logits, teacher, done.batch["labels"], self.distillation.temperature)
        parts.add(name, term)
        return weight * term

    def _log_step(self, parts: LossParts, gradient_norm: Tensor, tokens: int) -> None:
        now = time.perf_counter()
        seconds, self._last_update = now - self._last_update, now
        scheduler = self.lr_schedulers()
        assert scheduler is not None
        assert not isinstance(scheduler, list)
        means = parts.means()
        metrics: dict[str, Any] = means | {
            "gradient_norm": gradient_norm,
            "learning_rate": scheduler.get_last_lr()[0],
            "tokens_per_second": tokens * self.accumulate * self.trainer.world_size / seconds,
        }
        self.log_step({f"train/{name}": value for name, value in metrics.items()})
        self.log_dict({name: v for name, v in means.items() if name.endswith("/loss")}, prog_bar=True, logger=False)

    # --- what is kept -------------------------------------------------------------------------------------------

    def record(self) -> StageRecord:
        """As for every stage, with the calibration."""
        return replace(super().record(), calibration=self._calibrated)

    def settings(self) -> dict[str, Any]:
        """As for every stage, with this one's own."""
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        defaults = {k: v for k, v in optimizer.defaults.items() if isinstance(v, int | float | bool | str)}
        return super().settings() | {
            "clip_norm": self.clip_norm,
            "accumulate": self.accumulate,
            "full_weight": asdict(self.full_weight),
            "distillation": asdict(self.distillation),
            "optimizer": {"class": type(optimizer.optimizer).__name__, **defaults},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the calibration."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flextron"]["calibration"] = self._calibrated

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self._calibrated = checkpoint["flextron"]["calibration"]
