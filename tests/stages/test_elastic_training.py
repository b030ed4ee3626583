from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from flextron_lit import checkpoint
from flextron_lit.callbacks import BudgetSampling, ExactResume, FlextronCheckpointWriter
from flextron_lit.costs import parameter_table
from flextron_lit.stages import Calibration, ElasticTraining, FullWeight, NonFiniteError
from flextron_lit.stages.validation import Uniform, ValidationSet
from tests.stages.training import PLAN, Gradients, Plan, fit, stage, sum_of_losses


@pytest.mark.parametrize(
    ("accumulate", "full_weight", "checkpointing"), [(1, 1.0, False), (3, 0.5, False), (1, 1.0, True)]
)
def test_a_step_adds_up_the_gradients_of_full_and_sampled(accumulate, full_weight, checkpointing):
    weight = FullWeight(start=full_weight, end=full_weight)
    module = stage(accumulate=accumulate, full_weight=weight, activation_checkpointing=checkpointing)
    kept = Gradients()
    fit(module, Plan(), kept)
    assert len(kept.batches) == accumulate
    module.model.load_state_dict(kept.weights, strict=False)
    expected = sum_of_losses(module, kept.batches, PLAN, full_weight)
    assert all(torch.allclose(kept.kept[n], g, rtol=1e-4, atol=1e-6) for n, g in expected.items())
    without = sum_of_losses(module, kept.batches, PLAN[:1], full_weight)
    assert not all(torch.allclose(kept.kept[n], g, rtol=1e-4, atol=1e-6) for n, g in without.items())


def test_a_callbacks_loss_term_counts_in_every_pass():
    class Term(Callback):
        seen: list = []  # noqa: RUF012  # shared on purpose

        def on_fit_start(self, trainer, pl_module):
            pl_module.add_loss_term("size", self.term, weight=0.5)
            with pytest.raises(ValueError, match="there is a loss term 'size' already"):
                pl_module.add_loss_term("size", self.term)

        def term(self, done):
            self.seen.append(done.sub_network)
            return done.logits.square().mean()

    plain, with_term = Gradients(), Gradients()
    fit(stage(), Plan(), plain)
    module = stage()
    trainer = fit(module, Plan(), Term(), with_term)
    assert Term.seen == [module.backbone.space.full(), *PLAN]
    assert trainer.callback_metrics["train/size"] > 0
    assert any(not torch.allclose(plain.kept[n], with_term.kept[n]) for n in plain.kept)


class Poison(Callback):
    def __init__(self, where):
        self.where = where

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:
            self.before = {n: p.detach().clone() for n, p in pl_module.model.named_parameters()}
            if self.where == "loss":
                pl_module.add_loss_term("poison", lambda done: done.logits.sum() * float("nan"))

    def on_after_backward(self, trainer, pl_module):
        if self.where == "gradient" and trainer.global_step == 2:
            next(pl_module.model.parameters()).grad[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("loss", "before the update of step 3: the loss of the full network is nan.*weights are those of step 2"),
        (
            "gradient",
            r"before the update of step 3: the gradient norm is (inf|nan) \(trained: the full network, \(1, 2",
        ),
    ],
)
def test_what_is_not_finite_stops_before_the_update(where, message):
    poison = Poison(where)
    module = stage(clip_norm=1.0)
    with pytest.raises(NonFiniteError, match=message):
        fit(module, Plan(), poison, steps=5)
    assert all(torch.equal(p, poison.before[n]) for n, p in module.model.named_parameters())


def test_a_step_without_sub_networks_is_refused():
    with pytest.raises(ValueError, match=r"add callbacks.BudgetSampling to trainer.callbacks"):
        fit(stage())


def test_fp16_is_refused():
    with pytest.raises(ValueError, match=r"16-mixed is not supported; use bf16-mixed"):
        ElasticTraining.on_fit_start(SimpleNamespace(trainer=SimpleNamespace(precision="16-mixed")))


def test_a_schedule_that_waits_for_a_metric_is_refused():
    module = stage(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(ValueError, match="ReduceLROnPlateau waits for a metric"):
        fit(module, Plan())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"accumulate": 0}, "accumulate counts batches"),
        ({"attn_implementation": "flash"}, "sdpa or eager, not 'flash'"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        stage(**settings)
    with pytest.raises(ValueError, match="must be 0 or more"):
        Calibration(tokens=-1)
    with pytest.raises(ValueError, match="importance is one of magnitude, outgoing, not 'taylor'"):
        Calibration(importance="taylor")


def test_the_learning_rate_warms_up_and_falls():
    rates = []

    class Rates(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    fit(stage(), Plan(), Rates(), steps=30)
    peak = max(rates)
    assert peak == pytest.approx(1e-4)
    assert rates.index(peak) == 3
    assert rates[0] < rates[1] < peak > rates[10] > rates[29]
    assert rates[29] == pytest.approx(1e-5, rel=0.2)


@pytest.mark.parametrize("optimizer", ["torch.optim.SGD", "bitsandbytes.optim.AdamW8bit"])
def test_any_optimizer_trains(optimizer):
    package, _, name = optimizer.rpartition(".")
    made = getattr(__import__(package, fromlist=[name]), name)
    module = stage(optimizer=lambda params: made(params, lr=1e-2))
    kept = Gradients()
    fit(module, Plan(), kept, steps=3)
    assert all(torch.isfinite(p).all() for p in module.model.parameters())
    assert any(not torch.equal(p, kept.weights[n]) for n, p in module.model.named_parameters())


def test_budget_sampling_draws_the_same_again_after_a_restore(backbone):
    module = stage()
    module.backbone, module.costs = backbone, parameter_table(backbone)
    mix = {"independent": 1.0, "uniform": 1.0, "stratified": 1.0}
    sampling = BudgetSampling(k=3, strategies=mix, seed=4)
    drawn = []
    for index in range(6):
        if index == 3:
            state = sampling.state_dict()
        sampling.on_train_batch_start(None, module, None, index)
        drawn.append(module.plan)
    assert [len(p) for p in drawn] == [3] * 6
    restored = BudgetSampling(k=3, strategies=mix, seed=0)
    restored.load_state_dict(state)
    for index in range(3, 6):
        restored.on_train_batch_start(None, module, None, index)
        assert module.plan == drawn[index]
    assert len(set(map(tuple, drawn))) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BudgetSampling(k=0), "k counts sub-networks"),
        (lambda: BudgetSampling(strategies={"greedy": 1}), "no strategy 'greedy'; there are independent, uniform"),
        (lambda: BudgetSampling(strategies={"uniform": 0}), "need shares above 0"),
        (lambda: BudgetSampling(strategies={}), "need shares above 0"),
        (lambda: ExactResume(every_n_steps=0), "must be 1 or more"),
        (lambda: FlextronCheckpointWriter(keep="first"), "last or best, not 'first'"),
    ],
)
def test_a_wrong_callback_setting_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_best_checkpoint_is_kept_on_request(tmp_path):
    class Worsen(Callback):
        def on_validation_end(self, trainer, pl_module):
            means.append(pl_module.result.mean_loss)
            if trainer.global_step == 2:
                with torch.no_grad():
                    pl_module.model.model.norm.weight.mul_(20)

    means = []
    module = stage(
        validation=ValidationSet(uniform=[Uniform(mlp=0.5)], random_costs=[]),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
    )
    settings = {
        "limit_val_batches": 1.0,
        "num_sanity_val_steps": 0,
        "val_check_interval": 2,
        "default_root_dir": tmp_path,
    }
    callbacks = [Plan(), FlextronCheckpointWriter(keep="best"), Worsen()]
    fit(module, steps=4, callbacks=callbacks, check_val_every_n_epoch=None, **settings)
    assert means[0] < means[1]
    (record,) = checkpoint.read(tmp_path / "flextron").history
    assert record["steps"] == 2
