"""How much of a run is done: by its updates, or by the clock where time alone ends it."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Timer
from torch.optim.lr_scheduler import LambdaLR

from flextron_lit.callbacks import ExactResume
from flextron_lit.stages.run_length import TICKS, by_the_clock, clock, planned, share_done, updates_done
from tests.stages import training


class Clock(Timer):
    """Says what a test wants."""

    def __init__(self, elapsed, duration="00:00:00:10"):
        super().__init__(duration)
        self.elapsed = elapsed

    def time_elapsed(self, stage="train"):
        return self.elapsed


def trainer(*timers, **settings):
    defaults = {"max_steps": -1, "max_epochs": -1, "global_step": 7, "estimated_stepping_batches": math.inf}
    defaults |= {"train_dataloader": None, "ckpt_path": None}
    strategy = SimpleNamespace(broadcast=lambda value: value)
    return SimpleNamespace(callbacks=list(timers), strategy=strategy, **(defaults | settings))


def test_time_alone_is_counted_in_ticks_of_its_clock():
    timer = Clock(2.5)
    timed = trainer(timer)
    assert clock(timed) is timer
    assert (planned(timed), updates_done(timed)) == (TICKS, TICKS // 4)
    timer.elapsed = 99
    assert share_done(timer) == 1.0
    assert updates_done(timed) == TICKS


@pytest.mark.parametrize(
    "settings", [{"max_steps": 20}, {"max_epochs": 2, "estimated_stepping_batches": 40}], ids=["steps", "epochs"]
)
def test_what_ends_by_updates_is_counted_in_updates(settings):
    counted = trainer(Clock(2.5), **settings)
    assert clock(counted) is None
    assert planned(counted, accumulate=1 if "max_steps" in settings else 2) == 20
    assert updates_done(counted) == 7


def test_a_run_without_an_end_or_an_update_is_refused():
    with pytest.raises(ValueError, match="set trainer.max_steps, max_epochs or max_time"):
        planned(trainer(Timer()))
    with pytest.raises(ValueError, match=r"has 10 batches, but 16 make an update \(accumulate\)"):
        planned(trainer(max_epochs=1, estimated_stepping_batches=10), accumulate=16)


def test_a_schedule_goes_by_the_clock_or_by_its_own_count():
    def rates(*timers):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        run = trainer(*timers, **({} if timers else {"max_steps": 4}))
        schedule = by_the_clock(LambdaLR(optimizer, lambda step: 1 - step / planned(run)), run)
        for second in (1, 5, 10):
            for timer in timers:
                timer.elapsed = second
            optimizer.step()
            schedule.step()
            yield schedule.get_last_lr()[0]

    assert list(rates(Clock(0))) == pytest.approx([0.9, 0.5, 0.0])
    assert list(rates()) == [0.75, 0.5, 0.25]


class Stopped(Callback):
    """Ends its process, as it were, before a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyError("stopped")


def test_a_run_of_epochs_goes_on_within_its_second(tmp_path):
    def run(name, *callbacks, ckpt_path=None):
        module = training.stage()
        settings = {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
        epochs = {"max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 0}
        kept = [training.Plan(), *callbacks, ExactResume(1)]
        folder = tmp_path / name
        trainer = Trainer(
            accelerator="cpu", logger=False, default_root_dir=folder, callbacks=kept, **settings, **epochs
        )
        trainer.fit(module, datamodule=training.text(), ckpt_path=ckpt_path)
        assert trainer.global_step == 6
        return module.model.state_dict()

    whole = run("whole")
    with pytest.raises(KeyError, match="stopped"):
        run("stopped", Stopped(5))
    resumed = run("resumed", ckpt_path=tmp_path / "stopped" / "resume.ckpt")
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
