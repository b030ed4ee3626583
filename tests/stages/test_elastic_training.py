from dataclasses import replace
from statistics import fmean

import bitsandbytes
import pytest
import torch
from lightning.pytorch import Callback

from flextron_lit import checkpoint
from flextron_lit.callbacks import BudgetSampling, ExactResume, FlextronCheckpointWriter, ParetoReport
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.costs import parameter_table
from flextron_lit.files.damage import read_rows
from flextron_lit.report.points import validated
from flextron_lit.sources import load_dense
from flextron_lit.space import SubNetwork
from flextron_lit.stages import Calibration, Distillation, ElasticTraining, FullWeight, NonFiniteError
from flextron_lit.stages.validation import Uniform, ValidationSet
from tests.stages.training import PLAN, TINY, Gradients, Plan, fit, stage, sum_of_losses


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


class Made:
    """As what a config makes of a class: nothing that can be copied."""

    def __init__(self):
        self.parts = (part for part in ())

    def schedule(self, optimizer):
        return torch.optim.lr_scheduler.ConstantLR(optimizer)


def test_a_schedule_of_a_config_is_no_hindrance_to_the_record(tmp_path):
    module = stage(lr_scheduler=Made().schedule)
    fit(module, callbacks=[Plan(), FlextronCheckpointWriter()], default_root_dir=tmp_path)
    settings = checkpoint.read(tmp_path / "flextron").history[-1]["settings"]
    assert settings["clip_norm"] == 1e9
    assert settings["distillation"]["language"] == 1.0


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
    with pytest.raises(ValueError, match="importance is one of magnitude, outgoing, greedy, not 'taylor'"):
        Calibration(importance="taylor")


class Weights(Callback):
    """Those of the network when training starts, by name."""

    def on_train_start(self, trainer, pl_module):
        backbone = pl_module.backbone
        self.full, self.own = (
            {name: each.detach().clone() for name, each in named.items()}
            for named in (backbone.parameters, backbone.compensations)
        )


CONVERTED = Calibration(tokens=256, excess_tokens=128)


def test_compensation_alone_learns_and_the_full_network_stays_to_the_last_bit():
    for trained in ("compensation", "all"):
        module, before = stage(calibration=CONVERTED, trained=trained), Weights()
        fit(module, Plan(), before, steps=3)
        backbone = module.backbone
        kept = all(torch.equal(each, before.full[name]) for name, each in backbone.parameters.items())
        assert kept == (trained == "compensation")
        moved = {name for name, each in backbone.compensations.items() if not torch.equal(each, before.own[name])}
        module_of = {"mlp": "mlp", "attention": "self_attn"}
        drawn = {
            f"model.layers.{block.layer}.{module_of[block.kind]}.compensation.projections.{width}"
            for sub_network in PLAN
            for block, width in zip(backbone.space.blocks, backbone.space.widths(sub_network), strict=True)
            if 0 < width < block.full
        }
        assert moved == drawn
        assert drawn < before.own.keys()


def test_a_step_that_draws_the_full_network_has_nothing_to_learn():
    module = stage(calibration=CONVERTED, trained="compensation")
    full = SubNetwork((2, 3, 3, 3, 3, 3))
    trainer = fit(module, Plan([full, *PLAN]))
    assert module.backbone.space.full() == full
    assert trainer.global_step == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trained": "compensation"}, "have nothing of their own: convert it with calibration.compensation own"),
        ({"trained": "half"}, "trained is one of all, compensation, not 'half'"),
        ({"trained": "compensation", "full_weight": FullWeight(end=2.0)}, "have no effect; leave them out"),
        ({"trained": "compensation", "distillation": Distillation(full_from_original=1.0)}, "have no effect"),
        ({"calibration": Calibration(tokens=10**7)}, "blocks of domain stories; it has"),
    ],
)
def test_what_cannot_learn_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        fit(stage(**settings), Plan())


@pytest.mark.parametrize("spread", [None, 0.0])
def test_sub_networks_are_drawn_by_the_excess_losses_of_the_network(spread):
    class Drawn(Callback):
        plans: list = []  # noqa: RUF012  # of both runs

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.plans.append(list(pl_module.plan))

    module = stage(calibration=CONVERTED)
    fit(module, BudgetSampling(k=3, strategies={"excess": 1}, spread=spread), Drawn())
    generator = torch.Generator().manual_seed(0)
    # the strategy is drawn too, though there is but one
    torch.multinomial(torch.ones(1, dtype=torch.float64), 1, generator=generator)
    around, best = (generator.clone_state() for _ in range(2))
    space, table = module.backbone.space, module.cost_table("parameters")
    wanted = {None: module.excess.draw(space, table, 3, around), 0.0: module.excess.draw(space, table, 3, best, 0.0)}
    assert Drawn.plans == [wanted[spread]]
    assert wanted[None] != wanted[0.0]
    with pytest.raises(ValueError, match="goes by excess losses, and this network has none"):
        fit(stage(), BudgetSampling(strategies={"excess": 1}))


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
        (lambda: BudgetSampling(spread=0.1), "for the strategy excess, not 0.1 for independent, uniform"),
        (
            lambda: BudgetSampling(strategies={"excess": 1}, spread=-1),
            "spread must be 0 or more, for the strategy excess, not -1",
        ),
        (lambda: BudgetSampling(budgets=[0.8]), r"for the strategy excess, not \[0.8\] for independent, uniform"),
        (lambda: BudgetSampling(strategies={"excess": 1}, budgets=[]), "ratios above 0 and up to 1"),
        (lambda: BudgetSampling(strategies={"excess": 1}, budgets=[0.8, 1.1]), r"not \[0.8, 1.1\] for excess"),
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


def start(folder):
    """Mean loss of what was watched before training, by name."""
    rows = [row for row in read_rows(folder / "training.json") if row["step"] == 0]
    return {
        name: fmean(r["loss"] for r in rows if r["sub_network"] == name) for name in {r["sub_network"] for r in rows}
    }


class Scale(Callback):
    """Makes the outputs of the network larger or smaller, by which its loss is worse or better."""

    def __init__(self, factor):
        self.factor = factor

    def on_train_start(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.model.model.norm.weight.mul_(self.factor)


def test_training_that_does_not_help_is_not_kept(tmp_path):
    watched = ValidationSet(uniform=[Uniform(mlp=0.5)], random_costs=[])
    settings = {"limit_val_batches": 1.0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    found = tmp_path / "first" / "flextron"
    writers = [Plan(), Scale(20), FlextronCheckpointWriter()]
    fit(stage(validation=watched), callbacks=writers, default_root_dir=tmp_path / "first", **settings)

    def tuned(name, factor):
        module = ElasticTraining(str(found), validation=watched, clip_norm=1e9)
        callbacks = [Plan(), Scale(factor), ParetoReport(), FlextronCheckpointWriter(keep="best")]
        fit(module, callbacks=callbacks, default_root_dir=tmp_path / name, num_sanity_val_steps=-1, **settings)
        return tmp_path / name / "flextron"

    worse, better = tuned("worse", 20), tuned("better", 1 / 20)
    assert (worse / "model.safetensors").read_bytes() == (found / "model.safetensors").read_bytes()
    assert [row["stage"] for row in checkpoint.read(worse).history] == ["ElasticTraining", "ElasticTraining"]
    checkpoint.verify(worse)
    # what is shown of it is what was validated before training
    assert checkpoint.read(worse).history[-1]["steps"] == 0
    assert {point.value for point in validated([RunFolder(worse.parent)])} == set(start(worse.parent).values())
    # the control
    assert (better / "model.safetensors").read_bytes() != (found / "model.safetensors").read_bytes()


EVERY_LOSS = Distillation(sampled_from_full=0.5, sampled_from_original=0.25, full_from_original=0.5, temperature=2.0)


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_checkpointing": True}, pytest.param({"compiled": True}, marks=pytest.mark.slow)],
    ids=["plain", "recomputed", "compiled"],
)
def test_losses_by_chunks_train_as_those_of_all_logits(settings, as_traced):
    kept = []
    for chunk, distillation in ((0, EVERY_LOSS), (5, EVERY_LOSS), (5, replace(EVERY_LOSS, temperature=1.0))):
        torch.manual_seed(0)
        gradients = Gradients()
        # the original is another network than the one that learns
        trainer = fit(stage(loss_chunk=chunk, distillation=distillation, **settings), Nudged(), Plan(), gradients)
        losses = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
        kept.append((losses, gradients.kept))
    (whole, expected), (found, by_chunk), (_, other) = kept
    assert len([name for name in found if "kl_" in name]) == 3
    assert found == pytest.approx(whole, rel=1e-5, abs=1e-5)
    for name, gradient in by_chunk.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-5)
    assert not all(torch.allclose(other[name], expected[name], rtol=1e-5, atol=1e-5) for name in other)


class Nudged(Callback):
    def on_fit_start(self, trainer, pl_module):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in pl_module.model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def test_an_optimizer_keeps_its_states_in_8_bits():
    module = stage(optimizer=lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3))
    before = load_dense(TINY).state_dict()
    trainer = fit(module, Plan(), steps=2)
    states = [each["state1"] for each in trainer.optimizers[0].state.values()]
    # small tensors stay as they are, by bitsandbytes' own rule
    assert {state.dtype for state in states} == {torch.uint8, torch.float32}
    after = module.model.state_dict()
    assert all(torch.isfinite(after[name]).all() for name in before)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def _weights(module):
    return load_dense(TINY).state_dict()
