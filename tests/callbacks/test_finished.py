"""A run is finished when its result is there: no checkpoint of what is no number, no last table of an earlier step."""

import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from safetensors.torch import load_file

from flextron_lit import callbacks
from flextron_lit.callbacks import exact_resume
from flextron_lit.stages.stop_on_nan import NonFiniteError
from flextron_lit.stages.validation import ValidationSet
from tests.stages import training

EACH_STEP = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}


class Spoil(Callback):
    """Makes the network one that computes no numbers: in its weights, or only by what it computes."""

    def __init__(self, value, moment="on_train_batch_end"):
        self.value = value
        setattr(self, moment, self.spoil)

    def spoil(self, trainer, pl_module, *_):
        with torch.no_grad():
            pl_module.model.model.norm.weight.fill_(self.value)


def fit(folder, *added, steps=2, accumulate=1, **settings):
    module = training.stage(accumulate=accumulate, validation=ValidationSet(uniform=[], random_costs=[]))
    trainer = training.fit(
        module, steps=steps, default_root_dir=folder, callbacks=[training.Plan(), *added], **settings
    )
    return module, trainer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_network_of_no_numbers_is_not_written(value, tmp_path):
    with pytest.raises(NonFiniteError, match=r"no checkpoint is written: after step 1 the run's model.model.norm.weig"):
        fit(tmp_path, Spoil(value), callbacks.FlextronCheckpointWriter(), steps=1)
    assert not (tmp_path / "flextron").exists()


def test_nor_is_one_whose_last_losses_are_none(tmp_path):
    # numbers, but too large to compute with
    spoil = Spoil(3e38)
    with pytest.raises(NonFiniteError, match=r"the loss of the last validation, at step 1, is no number"):
        fit(tmp_path, spoil, callbacks.FlextronCheckpointWriter(), steps=1, **EACH_STEP)
    assert not (tmp_path / "flextron").exists()
    # and not by a run that resumes behind it
    resumed = callbacks.FlextronCheckpointWriter()
    resumed.load_state_dict({"best": float("inf"), "improved": False, "last": float("inf")})
    with pytest.raises(NonFiniteError, match="is no number"):
        fit(tmp_path, resumed, steps=1)


def test_best_of_no_numbers_is_nothing(tmp_path):
    best = callbacks.FlextronCheckpointWriter(keep="best")
    with pytest.raises(NonFiniteError, match=r"keep is best, and no validation gave a loss that is a number"):
        fit(tmp_path, Spoil(float("nan")), best, steps=1, **EACH_STEP)
    with pytest.raises(ValueError, match="limit_val_batches is 0: validate, or set keep to last"):
        fit(tmp_path, best, steps=1)
    assert not (tmp_path / "flextron").exists()


def test_a_run_without_an_update_has_no_result(tmp_path):
    with pytest.raises(ValueError, match=r"before its first update; train longer, or lower model.init_args.accumulate"):
        fit(tmp_path, callbacks.FlextronCheckpointWriter(), accumulate=9, max_epochs=1, limit_train_batches=2)
    with pytest.raises(ValueError, match=r"the run has 2 batches, but 9 make an update \(accumulate\)"):
        fit(tmp_path, accumulate=9, steps=-1, max_epochs=1, limit_train_batches=2)
    # nor anything to resume from, that would bind its folder
    exact_resume.ExactResume()._save(SimpleNamespace(global_step=0))
    assert not list(tmp_path.iterdir())


ENDINGS = {
    "epochs": ({"steps": -1, "max_epochs": 1, "limit_train_batches": 3, "val_check_interval": 2}, [0, 2, 3]),
    "epochs that are not validated": ({"steps": 3, "limit_train_batches": 2, "check_val_every_n_epoch": 3}, [0, 3]),
    "another callback": ({"steps": 4, "val_check_interval": 3, "check_val_every_n_epoch": None}, [0, 2]),
}


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step == 2


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_last_table_is_of_the_last_step(ending, tmp_path):
    settings, steps = ENDINGS[ending]
    more = [Stop()] if ending == "another callback" else []
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1} | settings
    fit(tmp_path, *more, callbacks.ParetoReport(), **settings)
    rows = json.loads((tmp_path / "training.json").read_text())
    assert sorted({row["step"] for row in rows}) == steps


def test_an_average_of_the_weights_is_what_is_kept(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.model.model.norm.weight.detach().clone())

    averaging = EMAWeightAveraging(decay=0.75, use_buffers=False)
    writer, report = callbacks.FlextronCheckpointWriter(), callbacks.ParetoReport()
    module, _ = fit(tmp_path, Watch(), averaging, report, writer, steps=3, **EACH_STEP)
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.75 * expected + 0.25 * weight
    assert not torch.equal(expected, seen[-1])
    kept = load_file(tmp_path / "flextron" / "model.safetensors")["model.norm.weight"]
    assert torch.allclose(kept, expected, atol=1e-7)
    # the copy that it keeps is of modules alone, and the last losses are those of the average
    assert type(averaging._average_model.module) is torch.nn.Module
    (loader,) = module.trainer.datamodule.val_dataloader()
    with torch.no_grad():
        losses = [module.measured(module.backbone.space.full(), batch) for batch in loader]
    total, tokens = (sum(each) for each in zip(*losses, strict=True))
    assert float(total / tokens) == pytest.approx(module.result.mean_loss, rel=1e-6)


def test_a_metric_that_is_not_there_is_noticed_before_the_first_step(tmp_path):
    absent = EarlyStopping("val/mlp50/mean/loss")
    with pytest.raises(ValueError, match=r"EarlyStopping waits for val/mlp50/mean/loss, .* val/full/mean/loss"):
        fit(tmp_path, absent, num_sanity_val_steps=-1, **EACH_STEP)
    fit(tmp_path, EarlyStopping("val/full/mean/loss"), num_sanity_val_steps=-1, **EACH_STEP)


def test_a_state_of_two_gpus_goes_on_where_there_is_one(monkeypatch):
    state = exact_resume.random_state() | {"cuda": [torch.tensor([1]), torch.tensor([2])]}
    given = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda each, device: given.update({device: each.item()}))
    exact_resume.set_random_state(state)
    assert given == {0: 1}


def test_a_validation_by_the_clock_is_foreseen_by_nobody():
    trainer = SimpleNamespace(enable_validation=True, should_stop=False, is_last_batch=False, val_check_batch=None)
    assert not exact_resume.validation_follows(trainer, 3)
