"""A stage that leaves the elastic backbone as it is: it measures losses of sub-networks, forward only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flextron_lit import checkpoint as flextron_checkpoint
from flextron_lit.costs import Workload
from flextron_lit.data import TextDataModule
from flextron_lit.data.loader import EpochSampler, ResumableLoader
from flextron_lit.measured_loss import MeasuredLoss, batches_of, loss_file
from flextron_lit.ranks import gather
from flextron_lit.routers.pairs import Pairs
from flextron_lit.sources import resolve_model
from flextron_lit.space import SubNetwork
from flextron_lit.stages.stage import Stage


class Positions(Dataset[int]):
    """0 to `size` - 1: a loader of these says which pairs make a batch, or just counts steps."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class FrozenStage(Stage):
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
        folder = resolve_model(self.checkpoint)
        if not flextron_checkpoint.is_flextron(folder):
            raise ValueError(
                f"{self.checkpoint} is no Flextron checkpoint, and {type(self).__name__} starts from one: run the "
                "elastic stage first (configs/stages/elastic.yaml) and name the checkpoint that it writes"
            )
        self.load_backbone(None)
        self.backbone.model.eval().requires_grad_(False)
        # Lightning does not know of it, and callbacks look at its device before the stage's own hooks run
        torch.nn.Module.to(self.backbone.model, self.trainer.strategy.root_device)
        return folder

    # --- measuring ----------------------------------------------------------------------------------------------

    def forward_context(self) -> AbstractContextManager[None]:
        """As the trainer's precision says."""
        return self.trainer.precision_plugin.forward_context()

    def measure_on(self, text: Mapping[str, Tensor], batch_size: int) -> None:
        """Choose the blocks that losses are measured on, [blocks, T]; what was measured on them before is known."""
        batches = batches_of(text, batch_size)
        file = loss_file(self.backbone, batches, str(self.trainer.precision))
        self.measured_loss = MeasuredLoss(self.backbone, batches, file=file, forward_context=self.forward_context)

    def measure(
        self, sub_networks: Sequence[SubNetwork], description: str | None = None, *, held_out: bool = False
    ) -> Pairs:
        """Losses of some sub-networks, shared out over the ranks; every rank gets all."""
        rank, world = self.trainer.global_rank, self.trainer.world_size
        own = self.measured_loss.all(sub_networks[rank::world], description)
        losses = [0.0] * len(sub_networks)
        for first, part in enumerate(gather(own, world)):
            losses[first::world] = part
        return Pairs.of(sub_networks, losses, held_out=held_out)

    # --- loaders ------------------------------------------------------------------------------------------------

    def positions(self, size: int, batch_size: int, seed: int) -> ResumableLoader:
        """Batches of 0 to `size` - 1 in an order of their own each epoch, the same on every rank."""
        sampler = EpochSampler([size], [1.0], seed=seed, rank=0, world=1)
        return ResumableLoader(Positions(size), sampler=sampler, batch_size=batch_size, num_workers=0)
