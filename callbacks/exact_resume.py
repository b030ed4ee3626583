import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from flextron_lit.checkpoint.resume_io import BLOCKS
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.files.ranks import gather
from flextron_lit.stages import Stage


class ExactResume(Checkpoint):
    """Keeps the state of an unfinished run, so that resuming it ends in the same weights, bit for bit on CPU.

    Lightning saves model, optimizers, loops and loaders; this adds the global random generators of every rank. The
    state is saved every `every_n_steps` updates, after each validation, and when the process is asked to stop
    (SIGTERM). A step that a validation follows is saved after it, so that no table is lost to a kill in between.

    Lightning's own answer to SIGTERM on several ranks broadcasts from within the signal handler, wherever each rank
    happens to be, which can wait forever. Here a rank only notes the signal, and all agree on it between two batches.

    Args:
        every_n_steps: updates between two saves.

    Raises:
        ValueError: if `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int = 20) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be 1 or more, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._restored: dict[str, Any] | None = None
        self._saved_step = 0
        self._asked_to_stop = False
        self._step_before = 0
        self._whole = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for SIGTERM."""
        if trainer.world_size == 1:
            return
        launcher = trainer.strategy.launcher

        def note(number: int, _: Any) -> None:
            if not self._asked_to_stop and launcher is not None:
                launcher.kill(number)
            self._asked_to_stop = True

        # after Lightning's, which restores the earlier handler when it ends
        signal.signal(signal.SIGTERM, note)

    # a resumed run has no sanity check
    on_train_start = on_sanity_check_start

    def _agree(self, trainer: Trainer) -> None:
        """Let Lightning stop all ranks at the same place once one of them was asked to."""
        if trainer.world_size > 1 and trainer.strategy.reduce_boolean_decision(self._asked_to_stop, all=False):
            trainer._signal_connector.received_sigterm = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Restore the generators at the first resumed batch: earlier, making iterators would draw from them."""
        self._step_before = trainer.global_step
        if self._restored is not None:
            set_random_state(self._restored)
            self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when due, unless a validation comes first."""
        step = trainer.global_step
        self._whole = step > self._step_before
        due = step % self.every_n_steps == 0 and step != self._saved_step
        if due and not validation_follows(trainer, batch_idx):
            self._save(trainer)
        self._agree(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A state saved from here on would resume behind a validation that did not end."""
        self._whole = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A state saved from here on would not resume at the next epoch's first batch."""
        self._whole = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state behind a finished table."""
        if trainer.training or (trainer.validating and trainer.state.fn == "fit" and not trainer.sanity_checking):
            self._save(trainer)
            self._agree(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when asked to stop between two updates; elsewhere the last saved state is the one to resume from."""
        if isinstance(exception, SIGTERMException) and trainer.state.fn == "fit" and self._whole:
            self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the generators of all ranks, and how much they read at once."""
        assert isinstance(pl_module, Stage)
        checkpoint["random_state"] = gather(random_state(), trainer.world_size)
        checkpoint[BLOCKS] = pl_module.blocks * trainer.world_size

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's generators for the first batch; of another number of ranks, some have those of the same."""
        states = checkpoint["random_state"]
        self._restored = states[trainer.global_rank % len(states)]

    def _save(self, trainer: Trainer) -> None:
        if not trainer.global_step:
            # there is nothing to lose yet
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(RunFolder(Path(trainer.default_root_dir)).resume_state, weights_only=False)


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the loop validates before the next training batch."""
    if not trainer.enable_validation:
        return False
    if trainer.should_stop or trainer.is_last_batch:
        return True
    if trainer.val_check_batch is None:
        # by the clock, which nobody knows beforehand
        return False
    loop = trainer.fit_loop
    done = loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return (done + 1) % trainer.val_check_batch == 0


def random_state() -> dict[str, Any]:
    """States of the global generators of Python, NumPy and torch, in types that a weights-only load accepts."""
    state: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = state
    return {
        "python": list(random.getstate()),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    # there may be fewer GPUs than the run saw before
    for device, each in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(each, device)
