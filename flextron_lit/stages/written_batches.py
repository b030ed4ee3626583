"""Training on what the network writes itself, beside the training text (ours, after LLM-QAT; see `written_text.py`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Self

import torch
from torch import Tensor

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.stages.run_length import planned
from flextron_lit.stages.watched_losses import WatchedStage
from flextron_lit.stages.written_text import Blocks, with_labels, written

MOST_BLOCKS = 256
"""That are written: longer runs read them again."""
SEED = 1
"""Another text than that of the calibration."""


@dataclass(frozen=True)
class WrittenBatches:
    """Takes the place of a share of a run's batches."""

    share: float
    blocks: Blocks
    """With labels, [blocks, block_size]."""

    @classmethod
    def write(cls, backbone: ElasticBackbone, share: float, blocks: int, block_size: int) -> Self:
        """What a run that reads so many blocks needs, at most `MOST_BLOCKS`.

        Args:
            backbone: whose full network writes.
            share: of the batches.
            blocks: of all batches.
            block_size: tokens of a block.
        """
        count = min(ceil(share * blocks), MOST_BLOCKS)
        return cls(share, with_labels(written(backbone, count * block_size, block_size, seed=SEED)))

    def instead(self, batch: Mapping[str, Tensor], number: int, rank: int = 0, ranks: int = 1) -> Mapping[str, Tensor]:
        """The batch itself, or, where it is the turn of a written one, that.

        Args:
            batch: tensors [B, T] by name.
            number: of the batch in the run, from 0.
            rank: of this process.
            ranks: how many there are; each reads other blocks.
        """
        turn = floor(number * self.share)
        if floor((number + 1) * self.share) == turn:
            return batch
        ids = batch["input_ids"]
        rows = (torch.arange(len(ids)) + (turn * ranks + rank) * len(ids)) % len(self.blocks["input_ids"])
        return {name: each[rows].to(ids.device) for name, each in self.blocks.items()}


class WritingStage(WatchedStage):
    """A stage that trains the backbone, on text and on what the full network writes as the stage begins."""

    _written: WrittenBatches | None = None

    def on_fit_start(self) -> None:
        """Write; a resumed run has it in its state."""
        super().on_fit_start()
        options: Any = self.options
        if options.written and self.trainer.ckpt_path is None:
            batches = planned(self.trainer, options.accumulate) * options.accumulate * self.trainer.world_size
            blocks = batches * self.text.batch_size
            made = WrittenBatches.write(self.backbone, options.written, blocks, self.text.block_size)
            # ranks that round otherwise would draw other tokens
            self._written = self.trainer.strategy.broadcast(made)

    def batch_of_step(self, batch: Batch) -> Batch:
        """What is trained on in the place of a loaded batch: itself, or a written one."""
        if self._written is None:
            return batch
        number, trainer = self.trainer.fit_loop.total_batch_idx, self.trainer
        return self._written.instead(batch, number, trainer.global_rank, trainer.world_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the text that the network wrote."""
        super().on_save_checkpoint(checkpoint)
        if self._written is not None:
            checkpoint["written"] = self._written.blocks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        if "written" in checkpoint:
            options: Any = self.options
            self._written = WrittenBatches(options.written, checkpoint["written"])
