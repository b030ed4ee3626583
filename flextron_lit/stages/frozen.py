"""A stage that leaves the elastic backbone as it is: it measures losses of sub-networks, forward only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import Dataset

from flextron_lit.costs import Workload
from flextron_lit.data import TextDataModule
from flextron_lit.data.loader import EpochSampler, ResumableLoader
from flextron_lit.stages.measuring import MeasuringStage


class Positions(Dataset[int]):
    """0 to `size` - 1: a loader of these says which pairs make a batch, or just counts steps."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class FrozenStage(MeasuringStage):
    """Base of the surrogate and router stages.

    The backbone is no part of this module: Lightning neither trains, saves nor wraps it, and the Flextron checkpoint
    that the stage writes shares its files with the one it started from.

    Args:
        checkpoint: a Flextron checkpoint.
        workload: what FLOPs, KV cache and memory are counted for, where no latency table says so.
        attn_implementation: `sdpa` or `eager`.
    """

    trains_backbone = False

    def __init__(self, checkpoint: str, *, workload: Workload, attn_implementation: str) -> None:
        super().__init__(checkpoint, attn_implementation=attn_implementation)
        self.workload = workload
        self._text: TextDataModule | None = None

    # --- set-up -------------------------------------------------------------------------------------------------

    def attach(self, text: TextDataModule) -> None:
        """Take the text; the stage makes its own loaders."""
        self._text = text

    @property
    def text(self) -> TextDataModule:
        """The text of the run."""
        assert self._text is not None, "attach the text before the run"
        return self._text

    def prepare_data(self) -> None:
        """Tokenise what the cache does not hold."""
        self.text.prepare_data()

    def setup(self, stage: str) -> None:
        """Open the token streams."""
        self.text.trainer = self.trainer
        self.text.setup(stage)

    def load_frozen(self) -> Path:
        """Load the backbone, for forward passes alone; returns the checkpoint's folder.

        Raises:
            ValueError: if the checkpoint is a dense model.
        """
        folder = self.flextron_folder()
        self.load_backbone(None)
        self.backbone.model.eval().requires_grad_(False)
        # Lightning does not know of it, and callbacks look at its device before the stage's own hooks run
        torch.nn.Module.to(self.backbone.model, self.trainer.strategy.root_device)
        return folder

    # --- loaders ------------------------------------------------------------------------------------------------

    def positions(self, size: int, batch_size: int, seed: int) -> ResumableLoader:
        """Batches of 0 to `size` - 1 in an order of their own each epoch, the same on every rank."""
        sampler = EpochSampler([size], [1.0], seed=seed, rank=0, world=1)
        return ResumableLoader(Positions(size), sampler=sampler, batch_size=batch_size, num_workers=0)
