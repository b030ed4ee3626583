"""Callbacks of runs that are interrupted: one that ends its own process, and one that notes what was trained on."""

import json
import os
import signal
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback

Moment = Literal[
    "train_batch_start",
    "train_batch_end",
    "train_epoch_end",
    "validation_batch_start",
    "sanity_batch_start",
    "save_checkpoint",
    "fit_end",
]


class KillOnce(Callback):
    """Kills the process when the moment comes at or after a step, and leaves a marker so as not to do it again;
    of several processes that of one rank, or all."""

    def __init__(
        self, marker: str, moment: Moment, step: int = 0, signal_name: str = "SIGKILL", rank: int | None = None
    ) -> None:
        self.marker = Path(marker)
        self.moment = moment
        self.step = step
        self.rank = rank
        self.signal = signal.Signals[signal_name]

    def _at(self, moment, trainer):
        if moment == self.moment and trainer.global_step >= self.step and not self.marker.exists():
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self.marker.write_text(f"{moment} at step {trainer.global_step}")
            trainer.strategy.barrier()
            if self.rank in (None, trainer.global_rank):
                os.kill(os.getpid(), self.signal)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._at("train_batch_start", trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._at("train_batch_end", trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self._at("train_epoch_end", trainer)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._at("sanity_batch_start" if trainer.sanity_checking else "validation_batch_start", trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self._at("save_checkpoint", trainer)

    def on_fit_end(self, trainer, pl_module):
        self._at("fit_end", trainer)


class Given(Callback):
    """Notes the blocks of every step, a file for each process; a step that is made again is noted again."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.folder.mkdir(parents=True, exist_ok=True)
        for rank in range(trainer.world_size, 9):
            # more processes were there before
            (self.folder / f"{trainer.global_step}-{rank}.json").unlink(missing_ok=True)
        path = self.folder / f"{trainer.global_step}-{trainer.global_rank}.json"
        path.write_text(json.dumps(batch["input_ids"].tolist()))
