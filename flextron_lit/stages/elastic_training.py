"""Stage 1: elastic continued training of the sorted network (paper, section on elastic continued training)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from flextron_lit.checkpoint import StageRecord
from flextron_lit.checkpoint.resume_io import read_state
from flextron_lit.costs import parameter_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.reconstruction import prepare
from flextron_lit.losses.by_chunk import Predictions
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.space import ElasticSpace, SpaceConfig, SubNetwork
from flextron_lit.stages.backbone_training import BackboneSettings, BackboneTraining
from flextron_lit.stages.calibration import Calibration
from flextron_lit.stages.conversion import convert
from flextron_lit.stages.loss_parts import Pass
from flextron_lit.stages.validation import ValidationSet


@dataclass(frozen=True, kw_only=True)
class ElasticSettings(BackboneSettings):
    """What elastic training can be told."""

    space: SpaceConfig | None = None
    """Width choices; the default are those of the checkpoint, or a quarter to all neurons and every KV group."""
    calibration: Calibration = Calibration()
    """How units are ordered and narrower widths reconstructed; a Flextron checkpoint is converted already."""
    validation: ValidationSet = ValidationSet()
    """The sub-networks to watch."""


class ElasticTraining(BackboneTraining):
    """Order and reconstruct a dense network in closed form, then train it together with sampled sub-networks of itself.

    Each step: the full network's forward, every sampled sub-network's forward and backward, the full network's
    backward, one update. A callback (BudgetSampling) sets the step's sub-networks.

    Routers and a surrogate of a Flextron checkpoint knew the weights that it had: they go along marked as stale.

    Args:
        checkpoint: a dense model, or a Flextron checkpoint to train on.
        optimizer: any torch optimizer; the default is AdamW without weight decay.
        settings: the fields of `ElasticSettings`.

    Raises:
        ValueError: if a number is out of range.
    """

    options: ElasticSettings

    def __init__(
        self,
        checkpoint: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        **settings: Any,
    ) -> None:
        super().__init__(checkpoint, optimizer, ElasticSettings(**settings))

    # --- set-up -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load, and convert a dense network."""
        self.load_trainable(self.options.space)
        if self._converts and self.trainer.ckpt_path is None:
            self._convert()
        elif self._converts:
            # a resumed run has its weights, their order and what narrower widths have of their own in its state
            if self.options.calibration.skips:
                state = read_state(Path(str(self.trainer.ckpt_path)), whole=False)
                self.take(ElasticBackbone(self.backbone.undo(), ElasticSpace.from_json(state["flextron"]["space"])))
            prepare(self.backbone, self.options.calibration.compensation)
        self.costs = parameter_table(self.backbone)
        self.watch(self.options.validation.resolve(self.backbone.space, self.costs), self.costs)

    @property
    def _converts(self) -> bool:
        """A Flextron checkpoint is converted already."""
        return not self.history and self.options.calibration.tokens > 0

    def _convert(self) -> None:
        calibration = self.options.calibration
        rank_zero_info(f"ordering units, {calibration.importance}, on {calibration.tokens} training tokens")
        self.model.to(self.trainer.strategy.root_device)
        # ranks may sum in another order; they must not end with other weights
        converted = self.trainer.strategy.broadcast(convert(self.backbone, self.text, calibration))
        built = converted.build(self.backbone)
        if built is not self.backbone:
            self.take(built)
        self.excess, self.order = converted.excess, [each.order for each in converted.blocks]

    # --- training -----------------------------------------------------------------------------------------------

    def train_planned(
        self, planned: SubNetwork, full: Pass, original: Predictions | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Forward and backward of a sampled sub-network."""
        # both inside one `use`: checkpointed activations are recomputed in backward, at the width of the forward
        with self.backbone.use(planned):
            done = Pass(planned, full.batch, self.predictions(full.batch))
            loss = self.smaller_loss(done, "sampled", full, original)
            self.backward_planned(loss)
        yield str(planned.choices), loss.detach()

    # --- what is kept -------------------------------------------------------------------------------------------

    def record(self) -> StageRecord:
        """As for every stage, with the calibration."""
        calibration = asdict(self.options.calibration) if self._converts else None
        return replace(super().record(), calibration=calibration)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the excess losses."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["flextron"]["space"] = self.backbone.space.to_json()
        checkpoint["flextron"]["excess"] = None if self.excess is None else asdict(self.excess)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint["flextron"].get("excess")
        self.excess = None if kept is None else ExcessTable(**kept)
