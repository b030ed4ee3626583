import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info

from flextron_lit.stages.run_length import clock, share_done

LINES = 10


class StepBar(RichProgressBar):
    """Lightning's bar, which counts batches of an epoch; ours says epoch only where there is more than one to come."""

    def _get_train_description(self, current_epoch: int) -> str:
        unbounded = self.trainer.max_epochs in (None, -1)
        return "training  " if unbounded else super()._get_train_description(current_epoch)


class StepLines(ProgressBar):
    """For logs: a line every tenth of the run, with losses and the time left."""

    def __init__(self) -> None:
        super().__init__()
        self._start = 0.0
        self._first_step = 0
        self._last_shown = 0

    def disable(self) -> None:
        """Called on the ranks that must stay silent; `rank_zero_info` already is."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start, self._first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far it is, and how long it will take."""
        step, timer = trainer.global_step, clock(trainer)
        if timer is not None:
            tenth = int(LINES * share_done(timer))
            if tenth == self._last_shown:
                return
            self._last_shown, of, left = tenth, "", timer.time_remaining() or 0.0
        else:
            last = planned_steps(trainer)
            if step == self._last_shown or step % max(1, last // LINES):
                return
            self._last_shown, of = step, f" of {last}"
            seconds = time.monotonic() - self._start
            left = seconds / max(1, step - self._first_step) * (last - step)
        metrics = self.get_metrics(trainer, pl_module)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float))
        rank_zero_info(f"step {step}{of}, {shown}, {max(0.0, left):.0f} s left")


def planned_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole run, at least as many as are done."""
    planned = trainer.max_steps if trainer.max_steps > 0 else trainer.estimated_stepping_batches
    return max(int(planned), trainer.global_step) if planned != float("inf") else trainer.global_step


def progress_bar() -> ProgressBar:
    """A bar on a terminal, lines elsewhere."""
    return StepBar() if sys.stdout.isatty() else StepLines()
