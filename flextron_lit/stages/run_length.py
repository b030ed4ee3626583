"""How long a run is, and how much of it is done: in updates or, where time alone ends it, by the clock."""

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from torch.optim.lr_scheduler import LambdaLR

TICKS = 10_000
"""What stands for the updates of a run that time alone ends."""


def clock(trainer: Trainer) -> Timer | None:
    """The timer of a run that nothing else ends."""
    if trainer.max_steps > 0 or (trainer.max_epochs or 0) > 0:
        return None
    timers = (each for each in trainer.callbacks if isinstance(each, Timer))  # type: ignore[attr-defined]
    return next((timer for timer in timers if timer.time_remaining() is not None), None)


def share_done(timer: Timer) -> float:
    """How much of its time has passed, 0 to 1."""
    left = timer.time_remaining()
    assert left is not None
    return min(1.0, timer.time_elapsed() / max(timer.time_elapsed() + left, 1e-9))


def planned(trainer: Trainer, accumulate: int = 1) -> int:
    """Updates of the whole run; ticks of the clock where time alone ends it.

    Args:
        trainer: of the run.
        accumulate: batches that make an update.

    Raises:
        ValueError: if it has no end, or ends before the first update.
    """
    if trainer.max_steps > 0:
        return trainer.max_steps
    if clock(trainer) is not None:
        return TICKS
    uncounted = trainer.train_dataloader is None
    batches = trainer.estimated_stepping_batches
    if uncounted and trainer.ckpt_path is not None:
        # what was made to count the batches is older than the state to resume from, and Lightning would not restore it
        trainer.fit_loop._combined_loader = None
    if batches == math.inf:
        raise ValueError("the schedule needs to know the end: set trainer.max_steps, max_epochs or max_time")
    if batches < accumulate:
        raise ValueError(
            f"the run has {batches} batches, but {accumulate} make an update (accumulate): nothing would be trained; "
            "lower accumulate, or train longer"
        )
    return int(batches) // accumulate


def updates_done(trainer: Trainer) -> int:
    """Of what is `planned`; the same on all ranks."""
    timer = clock(trainer)
    if timer is None:
        return trainer.global_step
    return round(TICKS * trainer.strategy.broadcast(share_done(timer)))


def by_the_clock(schedule: LambdaLR, trainer: Trainer) -> LambdaLR:
    """A schedule of `planned` steps, which goes by the clock where time alone ends the run."""
    if clock(trainer) is not None:
        # it counts its own steps, which say nothing of how far such a run is
        factors = schedule.lr_lambdas
        schedule.lr_lambdas = [lambda _, at=factor: at(updates_done(trainer)) for factor in factors]  # type: ignore[misc]
    return schedule
