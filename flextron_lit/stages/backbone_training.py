"""What the stages that train the backbone share: the full network beside parts of itself, on the same batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedModel, get_cosine_with_min_lr_schedule_with_warmup

from flextron_lit import checkpoint as flextron_checkpoint
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.sharding import whole
from flextron_lit.losses.by_chunk import Predictions, losses
from flextron_lit.losses.measured_loss import INPUTS, Batch
from flextron_lit.routers.excess import FILE as EXCESS
from flextron_lit.routers.staleness import stale_files
from flextron_lit.sources import load_dense, resolve_model
from flextron_lit.space import SpaceConfig
from flextron_lit.stages.base import StageSettings
from flextron_lit.stages.loss_parts import LossParts, Pass
from flextron_lit.stages.objective import Distillation, FullWeight
from flextron_lit.stages.precision import cast_weights
from flextron_lit.stages.run_length import by_the_clock, planned, updates_done
from flextron_lit.stages.written_batches import WritingStage

Trained = Literal["all", "compensation"]
WARMUP_SHARE = 0.1
FINAL_LEARNING_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class BackboneSettings(StageSettings):
    """What all stages that train the backbone can be told."""

    distillation: Distillation = Distillation()
    """KL terms beside the language loss; in joint tuning what holds for sampled sub-networks holds for routed ones."""
    full_weight: FullWeight = FullWeight()
    """Weight of the full network's loss over the run; that of a sampled or routed sub-network is 1."""
    trained: Trained = "all"
    """`all` weights, or only the `compensation` that narrower widths have of their own: then the full network stays
    what it is to the last bit, and needs no backward pass."""
    lr_scheduler: LRSchedulerCallable | None = None
    """Any schedule of the backbone, stepped at every update; the default warms up over a tenth of the steps and falls
    as a cosine to a tenth of the learning rate."""
    written: float = 0.0
    """Share of the batches that the full network writes itself as the stage begins, as `calibration.written`: narrower
    widths learn to follow it on all that it knows, not on the training text alone. Best with `sampled_from_full`."""
    compiled: bool = False
    """Run layers by code compiled for their widths (`model.compile_widths()`), training passes too: some 15 seconds for
    each kind of block and width in every run, which long ones get back."""
    activation_checkpointing: bool = False
    """Recompute activations in backward."""
    clip_norm: float = 1.0
    """Largest gradient norm of an update of the backbone; a router's is not clipped."""
    accumulate: int = 1
    """Batches whose gradients add up to one update."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be above 0, not {self.clip_norm}; a large number switches clipping off")
        if not 0 <= self.written < 1:
            raise ValueError(f"written is a share of the batches, from 0 to below 1, not {self.written}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate counts batches and must be 1 or more, not {self.accumulate}")
        if self.trained not in get_args(Trained):
            raise ValueError(f"trained is one of {', '.join(get_args(Trained))}, not {self.trained!r}")
        if self.trained == "compensation" and (self.full_weight != FullWeight() or self.distillation.from_original):
            raise ValueError(
                "trained is compensation, so the full network is the original and does not learn: full_weight, "
                "full_from_original and sampled_from_original have no effect; leave them out"
            )


class BackboneTraining(WritingStage):
    """Base of elastic training and joint tuning.

    Each step: the full network's forward, forward and backward of everything that is planned, the full network's
    backward, one update.

    Args:
        checkpoint: where the network comes from.
        optimizer: of the backbone.
        options: how it is trained.
    """

    recorded = (*WritingStage.recorded, "trained", "written", "clip_norm", "accumulate", "full_weight", "distillation")
    options: BackboneSettings

    def __init__(self, checkpoint: str, optimizer: OptimizerCallable, options: BackboneSettings) -> None:
        super().__init__(checkpoint, options)
        self.optimizer = optimizer
        self._original: tuple[PreTrainedModel, ...] = ()

    # --- set-up -------------------------------------------------------------------------------------------------

    def load_trainable(self, space: SpaceConfig | None) -> None:
        """Load the backbone as a part of this module, and the frozen original if something is distilled from it."""
        self.load_backbone(space)
        self.take(self.backbone)
        if self.options.distillation.from_original and self.trainer.state.fn == "fit":
            original = load_dense(self.checkpoint, attn_implementation=self.options.attn_implementation)
            original.requires_grad_(False)
            if self.sharding is None:
                torch.nn.Module.to(original, self.trainer.strategy.root_device)
            # in a tuple, so that it is no part of this module: not trained, not saved, not wrapped
            self._original = (original,)

    def take(self, backbone: ElasticBackbone) -> None:
        """Train this network."""
        if self.options.activation_checkpointing:
            backbone.enable_activation_checkpointing()
        self.backbone, self.model = backbone, backbone.model.train()
        rank_zero_info(backbone.summary())

    def cast(self, dtype: torch.dtype) -> None:
        """As for every stage, and the original's, where something is distilled from it."""
        super().cast(dtype)
        for original in self._original:
            cast_weights(original, dtype)

    def networks(self) -> Iterator[PreTrainedModel]:
        """The backbone, and the original."""
        yield from (self.backbone.model, *self._original)

    def settle(self) -> None:
        """Freeze what does not learn.

        Raises:
            ValueError: if nothing would learn.
        """
        if self.options.trained == "all":
            return
        own = self.backbone.compensations.values()
        if not own:
            raise ValueError(
                f"trained is compensation, but narrower widths of {self.checkpoint} have nothing of their own: convert "
                "it with calibration.compensation own or scales, or train all"
            )
        self.model.requires_grad_(False)
        for parameter in own:
            parameter.requires_grad_(True)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What data-parallel ranks leave to `reduce_gradients`: the full network's backward does not reach it."""
        # where nothing else learns no backward pass is for DDP, which wants to be asked for something
        return [f"model.{name}" for name in self.backbone.compensations] if self.options.trained == "all" else []

    def configure_optimizers(self) -> Any:
        """The backbone's optimizer and schedule.

        Raises:
            ValueError: for a schedule that waits for a metric.
        """
        optimizer = self.optimizer([each for each in self.model.parameters() if each.requires_grad])
        if self.options.lr_scheduler is None:
            steps = self.planned_updates()
            cosine = get_cosine_with_min_lr_schedule_with_warmup(
                optimizer, max(1, round(WARMUP_SHARE * steps)), steps, min_lr_rate=FINAL_LEARNING_RATE
            )
            scheduler: Any = by_the_clock(cosine, self.trainer)
        else:
            scheduler = self.options.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ValueError("ReduceLROnPlateau waits for a metric; take a schedule that is stepped at every update")
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def planned_updates(self) -> int:
        """Updates of the whole run; see `run_length.planned`."""
        return planned(self.trainer, self.options.accumulate)

    # --- training -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """As for every stage; then nothing is put into layers any more, and they can be compiled."""
        super().on_fit_start()
        if self.options.compiled:
            self.backbone.compile_widths()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Full forward, what is planned forward and backward, full backward: memory holds one graph more.

        In this order smaller networks can be distilled from the full one's detached logits, and memory does not grow
        with how many are planned: each graph is gone before the next is built.
        """
        self.check_plan()
        batch = self.batch_of_step(batch)
        space = self.backbone.space
        self.parts, self._share = LossParts(), self.share_of_tokens(batch["labels"])
        original = self._original_predictions(batch)
        learns = self.options.trained == "all"
        with self.backbone.use(space.full()), torch.set_grad_enabled(learns):
            full = Pass(space.full(), batch, self.predictions(batch))
            teachers = {"original": (original, self.options.distillation.full_from_original)}
            full_loss = self._loss(full, "full", 1.0, teachers)
        last = (self.trainer.fit_loop.total_batch_idx + 1) % self.options.accumulate == 0
        # data-parallel ranks reduce all gradients once, in the full network's backward: it alone uses every parameter,
        # and DDP would wait for the others
        with self._no_sync():
            trained = dict(chain.from_iterable(self.train_planned(p, full, original) for p in self.plan))
            if learns and not last:
                self.train_full(full_loss)
        if learns and last:
            self.train_full(full_loss)
        self.tokens_seen += batch["input_ids"].numel() * self.trainer.world_size
        if last:
            norms = self._update({"the full network": full_loss.detach(), **trained})
            self._log_step(norms)

    def train_planned(self, planned: Any, full: Pass, original: Predictions | None) -> Iterator[tuple[str, Tensor]]:
        """Forward and backward of what one entry of the plan stands for: what to call each pass, and its loss."""
        raise NotImplementedError

    def backward_planned(self, loss: Tensor) -> None:
        """Backward of one pass of what is planned, with the selection still active that it ran with."""
        # where compensation alone is trained, the full network may be drawn too and have nothing to learn
        if loss.requires_grad:
            self.manual_backward(loss / self.options.accumulate)

    def train_full(self, loss: Tensor) -> None:
        """The full network's backward."""
        weight = self.options.full_weight
        progress = 0.0 if weight.constant else updates_done(self.trainer) / max(1, self.planned_updates() - 1)
        # checkpointed activations are recomputed in backward, so the selection must be the one of the forward
        with self.backbone.use(self.backbone.space.full()):
            self.manual_backward(loss * (weight.at(progress) / self.options.accumulate))

    def _no_sync(self) -> AbstractContextManager[None]:
        """Keep data-parallel ranks from reducing gradients in the backward passes inside."""
        wrapped = self.trainer.strategy.model
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    # --- losses -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _original_predictions(self, batch: Batch) -> Predictions | None:
        inputs = {name: batch[name] for name in INPUTS}
        for original in self._original:
            return Predictions.of(original, inputs, self.options.loss_chunk)
        return None

    def _loss(
        self, done: Pass, name: str, language: float, teachers: Mapping[str, tuple[Predictions | None, float]]
    ) -> Tensor:
        """Loss of a pass: weighted language loss, the callbacks' terms, and what it shall learn from its teachers.

        Args:
            done: the pass.
            name: the beginning of the names that parts of the loss are logged by.
            language: weight of the language loss.
            teachers: what they predict and their weight, by name; None where the weight is 0.
        """
        learned = {each: given for each, (given, weight) in teachers.items() if weight and given is not None}
        temperature = self.options.distillation.temperature
        own, terms = losses(done.predictions, done.batch["labels"], learned, temperature)
        self.parts.add(f"{name}/loss", own)
        loss = self._share * language * own + self.terms(done)
        for teacher, term in terms.items():
            self.parts.add(f"{name}/kl_{teacher}", term)
            loss = loss + self._share * teachers[teacher][1] * term
        return loss

    def smaller_loss(self, done: Pass, name: str, full: Pass, original: Predictions | None) -> Tensor:
        """Loss of a pass that is not the full network's; its parts are logged under a name."""
        weights = self.options.distillation
        teachers = {
            "full": (full.predictions, weights.sampled_from_full),
            "original": (original, weights.sampled_from_original),
        }
        return self._loss(done, name, weights.language, teachers)

    # --- the update ---------------------------------------------------------------------------------------------

    def _update(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Clip and apply the gradients, unless something is not finite.

        Args:
            losses: what went into the gradients, by name of the sub-network.

        Returns:
            Gradient norms before clipping, by name.

        Raises:
            NonFiniteError: before the update, naming the step and the sub-network.
        """
        self.reduce_gradients()
        norms = self.clip()
        values = {f"the loss of {name}": loss for name, loss in losses.items()}
        values |= {f"the {name.replace('_', ' ')}": norm for name, norm in norms.items()}
        self.check_finite(values, f" (trained: {', '.join(losses)})")
        self.step_optimizers()
        return norms

    def unreduced(self) -> Sequence[torch.nn.Parameter]:
        """What narrower widths have of their own, where every process holds the network: see what DDP is told."""
        return super().unreduced() if self.sharding else list(self.backbone.compensations.values())

    def clip(self) -> dict[str, Tensor]:
        """Clip the backbone's gradients; norms before that, by name."""
        norm = torch.nn.utils.clip_grad_norm_(self.backbone.model.parameters(), self.options.clip_norm)
        return {"gradient_norm": whole(norm)}

    def _log_step(self, norms: dict[str, Tensor]) -> None:
        means = self.parts.means()
        metrics: dict[str, Any] = means | norms | self.rates()
        self.log_step({f"train/{name}": value for name, value in metrics.items()})
        self.log_dict({name: v for name, v in means.items() if name.endswith("/loss")}, prog_bar=True, logger=False)

    def rates(self) -> dict[str, float]:
        """The learning rate, for the log."""
        return {"learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"]}

    # --- what is kept -------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """What the checkpoint that the stage started from knew of its weights: kept, and marked as stale.

        Not so the excess losses: widths that lost most before training still do.
        """
        space = self.backbone.space
        excess = {} if self.excess is None else {EXCESS: self.excess.to_bytes(space)}
        folder = resolve_model(self.checkpoint)
        # choices of another space would mean other widths
        if not self.history or flextron_checkpoint.read(folder).space != space:
            return excess
        return excess | stale_files(folder, space, type(self).__name__)

    def settings(self) -> dict[str, Any]:
        """As for every stage, with the optimizer."""
        return super().settings() | {"optimizer": described(self.trainer.optimizers[0])}


def described(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's class and numbers, JSON-able."""
    defaults = {k: v for k, v in optimizer.defaults.items() if isinstance(v, int | float | bool | str)}
    return {"class": type(optimizer).__name__, **defaults}
