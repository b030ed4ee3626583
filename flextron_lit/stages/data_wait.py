"""How long training waits for its batches."""

import time
from typing import Any

from lightning.pytorch import LightningModule


class WaitingForData(LightningModule):
    """Tells waiting for batches from the rest of a step, by two readings of the clock around each batch.

    Waiting is what the loader keeps the process from going on: its workers' work is none of it while they keep ahead.
    Nothing waits for a GPU here, so the rest of a step is what the host sees of it; validation is no part of either.
    Where a stage overrides one of these hooks it calls the one here.
    """

    def __init__(self) -> None:
        super().__init__()
        self._since = time.perf_counter()
        self._waited = 0.0
        self._worked = 0.0

    def take_seconds(self) -> tuple[float, float]:
        """What passed since it was last asked, validation apart: seconds waiting for batches, and seconds in all."""
        self._worked += self._lap()
        waited, total = self._waited, self._waited + self._worked
        self._waited = self._worked = 0.0
        return waited, total

    def _lap(self) -> float:
        """Seconds since the last reading."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before

    def on_train_epoch_start(self) -> None:
        """The first batch is wanted; workers start now."""
        self._lap()

    def on_validation_end(self) -> None:
        """The next batch is wanted."""
        self._lap()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The batch is there; Lightning's first hook behind the loader."""
        if self.trainer.training:
            self._waited += self._lap()
        return batch

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The next batch is wanted: Lightning calls the module behind all callbacks."""
        self._worked += self._lap()
