"""A stage that leaves the elastic backbone as it is: it measures losses of sub-networks, forward only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron_lit.costs import Workload
from flextron_lit.data import TextDataModule
from flextron_lit.data.loader import EpochSampler, ResumableLoader
from flextron_lit.routers.trained import TrainedSurrogate
from flextron_lit.stages.base import StageSettings
from flextron_lit.stages.loss_measuring import MeasuringStage
from flextron_lit.stages.precision import WeightsAlone


@dataclass(frozen=True, kw_only=True)
class FrozenSettings(StageSettings):
    """What all stages that leave the backbone as it is can be told."""

    workload: Workload = Workload()
    """What FLOPs, KV cache and memory are counted for, where no latency table says so."""


class FrozenStage(MeasuringStage):
    """Base of the surrogate and router stages.

    The backbone is no part of this module: Lightning neither trains, saves nor wraps it, and the Flextron checkpoint
    that the stage writes shares its files with the one it started from.

    Args:
        checkpoint: a Flextron checkpoint.
        options: how the stage goes about it.
    """

    trains_backbone = False

    def __init__(self, checkpoint: str, options: FrozenSettings) -> None:
        super().__init__(checkpoint, options)
        self.workload = options.workload

    # --- set-up -------------------------------------------------------------------------------------------------

    def attach(self, text: TextDataModule) -> None:
        """Take the text; the stage makes its own loaders."""
        self.tell_needs(text)

    def prepare_data(self) -> None:
        """Tokenise what the cache does not hold."""
        self.text.prepare_data()

    def setup(self, stage: str) -> None:
        """As for every stage; and open the token streams."""
        super().setup(stage)
        self.text.trainer = self.trainer
        self.text.setup(stage)

    def load_frozen(self) -> Path:
        """Load the backbone, for forward passes alone; returns the checkpoint's folder.

        Raises:
            ValueError: if the checkpoint is a dense model.
        """
        folder = self.flextron_folder()
        self.load_backbone(None)
        if isinstance(self.trainer.precision_plugin, WeightsAlone):
            # at once: what routers answer is made for the weights as they will run
            self.trainer.precision_plugin.convert_module(self)
        self.backbone.model.eval().requires_grad_(False)
        # Lightning does not know of it, and callbacks look at its device before the stage's own hooks run
        if self.sharding is None:
            torch.nn.Module.to(self.backbone.model, self.trainer.strategy.root_device)
        return folder

    def read_surrogate(self, folder: Path, name: str) -> TrainedSurrogate:
        """The surrogate of a checkpoint.

        Args:
            folder: the checkpoint.
            name: what is missing, for the error.

        Raises:
            ValueError: if there is none, or a run would learn from one that is stale.
        """
        trained = TrainedSurrogate.read(folder, self.backbone.space)
        if trained is None:
            raise ValueError(f"{folder} holds no {name}: run the surrogate stage first (configs/stages/surrogate.yaml)")
        if self.trainer.state.fn == "fit":
            trained.refuse_stale(folder)
        return trained

    # --- loaders ------------------------------------------------------------------------------------------------

    def positions(self, size: int, batch_size: int, seed: int) -> ResumableLoader:
        """Batches of 0 to `size` - 1 in an order of their own each epoch, the same on every rank."""
        sampler = EpochSampler([size], [1.0], seed=seed, rank=0, world=1)
        positions: Any = range(size)
        return ResumableLoader(positions, sampler=sampler, batch_size=batch_size, num_workers=0)
