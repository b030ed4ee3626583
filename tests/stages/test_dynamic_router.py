"""The dynamic router's stage: its guides in process, its prices, what it writes, and runs that are killed or shared."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback

from flextron_lit import callbacks, checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.costs import COUNTED, Workload
from flextron_lit.routers import dynamic
from flextron_lit.routers.budget_prices import LARGEST, TOLERANCE
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter, RoutedPass
from flextron_lit.routers.from_surrogate import train_router
from flextron_lit.routers.ladder import Ladder, Rung
from flextron_lit.routers.noise import gumbel_noise
from flextron_lit.routers.surrogate import Surrogate, TokenSurrogate
from flextron_lit.routers.trained import SURROGATE, TrainedDynamicRouter, TrainedRouter, TrainedSurrogate
from flextron_lit.space import SpaceConfig, SubNetwork, resolve
from flextron_lit.stages import DynamicRouterTraining, SurrogateTraining
from flextron_lit.stages.guides import Observed, SequenceGuide, TokenGuide
from tests.front_door import ENVIRONMENT, ROOT, run, succeed
from tests.options import seed
from tests.runs import logged, table
from tests.stages import training
from tests.stages.prices import Solved, cost_of
from tests.stages.routers import Watch, fit, moved, trainer_of

SMALL = {"cost": "flops", "guidance": "token", "block_size": 32, "batch_size": 4, "calibration_tokens": 64, "prices": 2}
GUIDE = {"every_n_steps": 1, "pairs": 64, "threshold": 1e9}
VALIDATED = {"limit_val_batches": None, "check_val_every_n_epoch": None}


@pytest.fixture(scope="session")
def elastic(tmp_path_factory):
    """The checkpoint of a short elastic run."""
    folder = tmp_path_factory.mktemp("elastic") / "flextron"
    stage = training.stage(optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3))
    training.fit(stage, callbacks.BudgetSampling(k=2), steps=60)
    checkpoint.write(folder, stage.backbone, stage.tokenizer, order=stage.order, history=[])
    return folder


@pytest.fixture(scope="session")
def static(elastic, tmp_path_factory):
    """A checkpoint with a surrogate and a static router for FLOPs."""
    folder = tmp_path_factory.mktemp("static")
    stage = SurrogateTraining(str(elastic), pairs=64, held_out=8, tokens=256, block_size=64, batch_size=16)
    fit(stage, folder, max_epochs=10)
    surrogate = folder / "surrogate"
    checkpoint.extend(elastic, surrogate, files=stage.files())
    space = stage.backbone.space
    costs = COUNTED["flops"](stage.backbone, Workload())
    router = train_router(space, costs, TrainedSurrogate.read(surrogate, space), steps=30, seed=seed(0))
    checkpoint.extend(surrogate, folder / "flextron", files=router.files())
    return folder / "flextron"


def guided(folder, tmp_path, *others, guidance="token", steps=8, guide=None, settings=None, **options):
    """A run through a surrogate, or through the backbone."""
    watch = Watch()
    stage = DynamicRouterTraining(str(folder), **(SMALL | {"guidance": guidance} | (settings or {})))
    gate = [] if guidance == "backbone" else [callbacks.SurrogateGuidance(**(GUIDE | {"window": 8} | (guide or {})))]
    trainer = fit(stage, tmp_path, callbacks.BudgetSampling(k=4), *gate, watch, *others, max_steps=steps, **options)
    assert trainer.global_step == steps
    return stage, watch


@pytest.fixture(scope="module")
def trained(static, tmp_path_factory):
    """A stage after a run with tables, and its folder."""
    folder = tmp_path_factory.mktemp("dynamic")
    writer = callbacks.FlextronCheckpointWriter()
    finer = {"calibration_tokens": 256, "prices": 7}
    stage, _ = guided(static, folder, writer, steps=30, settings=finer, val_check_interval=30, **VALIDATED)
    return stage, folder / "flextron"


# --- what guides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["token", "sequence", "backbone"])
def test_every_guide_moves_the_router_and_nothing_of_the_backbone(guidance, static, tmp_path):
    stage, watch = guided(static, tmp_path, guidance=guidance)
    # through a surrogate the first step is what the gate looks at
    assert watch.open == [guidance == "backbone"] + [True] * 7
    assert all(moved(watch.router))
    assert all(moved(watch.surrogate))
    assert bool(watch.surrogate) == (guidance != "backbone")
    assert stage.moves == sum(watch.open)
    assert stage.tokens_seen == 8 * 4 * 32
    untouched = dict(load_elastic(str(static)).backbone.model.named_parameters())
    for name, parameter in stage.backbone.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, untouched[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stage.backbone.model.modules())


@pytest.mark.parametrize("guidance", ["token", "sequence"])
def test_with_a_shut_gate_the_router_stays_bit_for_bit_and_the_surrogate_learns(guidance, static, tmp_path):
    stage, watch = guided(static, tmp_path, guidance=guidance, guide={"threshold": 1e-9})
    assert not any(watch.open)
    assert not any(moved(watch.router))
    assert not stage.router.weight.any()
    assert all(moved(watch.surrogate))
    assert stage.moves == 0
    assert stage.settings()["router_moves"] == 0


class Gradients(Callback):
    """Of the router, before each update."""

    def __init__(self):
        self.kept = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.kept.append({name: p.grad.clone() for name, p in pl_module.router.named_parameters()})


def test_through_the_backbone_every_block_of_the_router_has_a_gradient(static, tmp_path):
    gradients = Gradients()
    guided(static, tmp_path, gradients, guidance="backbone", steps=1)
    (kept,) = gradients.kept
    assert (kept["weight"].flatten(1).norm(dim=1) > 0).all()
    assert (kept["bias"].flatten(2).norm(dim=2).sum(0) > 0).all()
    # the first attention has three widths, and no gradient goes to a fourth
    assert not kept["weight"][0, 3].any()


def test_the_guides_loss_reaches_the_router_and_not_the_surrogate(static, tmp_path):
    for guidance in ("token", "sequence"):
        stage, _ = guided(static, tmp_path, guidance=guidance, steps=1)
        states = torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(seed(0)))
        routed = RoutedPass(
            stage.router, torch.tensor([0.5, 0.6, 0.7, 0.9]), torch.Generator().manual_seed(seed(0)), 1.0
        )
        for block in range(len(stage.backbone.space)):
            routed.choose(block, states)
        stage.zero_grad()
        with torch.no_grad():
            # a token surrogate starts from zero
            for parameter in stage.surrogate.parameters():
                parameter.normal_(generator=torch.Generator().manual_seed(seed(1)))
        stage.predicted(routed).backward()
        assert all(p.grad.abs().sum() > 0 for p in stage.router.parameters())
        assert all(p.grad is None for p in stage.surrogate.parameters())


# --- how it starts ----------------------------------------------------------------------------------------------


def test_it_starts_from_the_static_ladder(static, tmp_path):
    space = checkpoint.read(static).space
    (trained,) = TrainedRouter.read_all(static, space)
    # rungs at known costs: what a short training gives may be two
    subs = [space.smallest(), *(space.uniform(share, share) for share in (0.25, 0.5)), space.full()]
    rungs = [Rung(trained.table.cost(sub), 9.0 - place, sub) for place, sub in enumerate(subs)]
    planted = dataclasses.replace(trained, ladder=Ladder(tuple(rungs)))
    checkpoint.extend(static, tmp_path / "flextron", files=planted.files())
    stage, _ = guided(tmp_path / "flextron", tmp_path, guide={"threshold": 1e-9}, steps=1)
    router = stage.router
    assert stage.static.ladder == planted.ladder
    assert router.budgets[0] == pytest.approx(stage.table.smallest_ratio)
    assert router.budgets[-1] == 1.0
    answers = [SubNetwork(tuple(row)) for row in router.bias.argmax(-1).tolist()]
    # what runs grouped pays for its router too
    dearest = [
        max((sub for sub in subs if stage.table.ratio(sub) <= budget), key=subs.index, default=subs[0])
        for budget in router.budgets.tolist()
    ]
    assert answers == dearest
    # the full network with routers costs more than without, so no budget pays it
    assert set(answers) == set(subs[:-1])
    # its inputs were measured
    mean, std = stage._input_scale()
    assert torch.equal(router.centre, mean)
    assert torch.equal(router.scale, std.clamp(min=0.1 * float(std.mean())))


# --- prices -----------------------------------------------------------------------------------------------------


def test_budgets_are_met_on_the_calibration_mix(trained, monkeypatch):
    stage, _ = trained
    rows = stage.prices.rows
    assert {0.9, 0.8, 0.7, 0.6} < {row.budget for row in rows}
    assert len(rows) == 4 + stage.options.prices
    assert all(row.ratio <= (1 + TOLERANCE) * row.budget for row in rows)
    assert all(math.isfinite(row.loss) for row in rows)
    solved = Solved(monkeypatch)
    assert stage._prices_of([row.budget for row in rows]) == stage.prices
    solved.check(stage.prices, stage.table)
    # what is noted is what its policy does, and no price does the same as any other
    row = rows[len(rows) // 2]
    batches = list(stage.text.calibration_batches(256, batch_size=4))
    for price, ratio in (
        (row.price, row.ratio),
        (LARGEST, stage.table.smallest_ratio),
        (-LARGEST, stage.table.largest_ratio),
    ):
        policy = DynamicPolicy(stage.router, stage.table, [row.budget], [price])
        assert cost_of(stage, policy, batches) == pytest.approx(ratio, abs=1e-6)


def test_a_router_that_does_not_tell_tokens_apart_never_exceeds_a_budget(static, tmp_path, monkeypatch):
    stage, _ = guided(static, tmp_path, guide={"threshold": 1e-9}, steps=1)
    assert not stage.router.weight.any()
    for row in stage.prices.rows:
        assert row.ratio <= (1 + TOLERANCE) * row.budget
    # where no choice is better than another all tokens give way to any price at once
    with torch.no_grad():
        stage.router.bias.zero_()
    solved = Solved(monkeypatch)
    prices = stage._prices_of([row.budget for row in stage.prices.rows])
    solved.check(prices, stage.table)
    assert [row.ratio for row in prices.rows] == pytest.approx([stage.table.smallest_ratio] * len(prices.rows))
    assert any(row.ratio < (1 - TOLERANCE) * row.budget for row in prices.rows)


def test_a_budget_above_all_that_can_be_spent_is_met(trained, monkeypatch):
    stage, _ = trained
    dearer = dataclasses.replace(stage.table, reference=1.3 * stage.table.full)
    monkeypatch.setattr(stage, "table", dearer)
    solved = Solved(monkeypatch)
    prices = stage._prices_of([1.0])
    # nearly all of it is asked for
    solved.check(prices, dearer)
    (target,) = solved.tried
    (row,) = prices.rows
    assert 0.97 * dearer.largest_ratio < target
    assert row.ratio < dearer.largest_ratio < 1.0 == row.budget


# --- what only a surrogate of tokens can teach ------------------------------------------------------------------

TOY = resolve(SpaceConfig(mlp=[0, 64], attention=[1, 4]), num_layers=1, neurons=64, kv_groups=4)
MLP = 1
KINDS = torch.tensor([*[0, 1] * 32, 0])
STATES = torch.nn.functional.one_hot(KINDS, 4).float()[None] * 2
"""Tokens of two kinds by turns, [1, 65, 4]: the last predicts nothing, so that as many of both count."""


def toy(guidance, hard_by_state):
    """A guide whose surrogate knows that skipping the MLP costs 4 nats: of hard tokens alone, or of all half of it."""
    generator = torch.Generator().manual_seed(seed(0))
    with torch.no_grad():
        if guidance == "token":
            surrogate = TokenSurrogate(TOY, 4, rank=1, hidden=4, generator=generator)
            kinds = surrogate.norm(torch.eye(4)[:2])
            # 1 for the second kind, 0 for the first
            surrogate.directions.weight.copy_(torch.linalg.pinv(kinds)[:, 1])
            target = surrogate.effects if hard_by_state else surrogate.main
        else:
            surrogate = Surrogate(TOY, 4, generator)
            target = surrogate.main
        target.weight[0, MLP * TOY.num_choices] = 4.0 if hard_by_state else 2.0
    guide = TokenGuide(surrogate, 1) if guidance == "token" else SequenceGuide(surrogate, 1, "loss")
    nothing = torch.zeros(1, 64)
    guide.seen = Observed(nothing, nothing, counted=torch.ones(1, 64, dtype=torch.bool), states=STATES[:, :-1])
    return guide


def learn(guide, steps=150):
    """Train a router for the toy at a budget that pays the MLP for half of the tokens."""
    router = DynamicRouter(TOY, 4, torch.tensor([0.0, 1.0]))
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(seed(1))
    for _ in range(steps):
        routed = RoutedPass(router, torch.tensor([0.5]), generator, 1.0)
        for block in range(len(TOY)):
            routed.choose(block, STATES)
        wide = routed.chosen[:, :-1, MLP, 1].mean()
        loss = guide.predicted(routed) + 10 * (wide - 0.5).clamp(min=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = router.logits(MLP, STATES, torch.tensor([0.5]))[0]
    # share of the tokens of each kind that are likely to take the MLP
    probability = logits.softmax(-1)[:, 1]
    return [probability[kind == KINDS].mean().item() for kind in (0, 1)]


def test_a_surrogate_of_tokens_teaches_which_tokens_need_width():
    easy, hard = learn(toy("token", hard_by_state=True))
    assert hard > 0.9
    assert easy < 0.1


@pytest.mark.parametrize("guidance", ["token", "sequence"])
def test_a_surrogate_that_does_not_know_tokens_cannot(guidance, monkeypatch):
    def paired(shape, generator):
        """Both kinds draw the same, or chance alone would tell them apart."""
        rows, tokens, *rest = shape
        return gumbel_noise((rows, (tokens + 1) // 2, *rest), generator).repeat_interleave(2, 1)[:, :tokens]

    monkeypatch.setattr(dynamic, "gumbel_noise", paired)
    easy, hard = learn(toy(guidance, hard_by_state=False))
    assert hard == pytest.approx(easy, abs=0.05)
    # the budget pays some of the tokens, and not all
    assert 0.1 < (easy + hard) / 2 < 0.9
    # what knows tokens tells them apart by the same draws
    easy, hard = learn(toy("token", hard_by_state=True))
    assert hard - easy > 0.8


@pytest.mark.parametrize(
    ("guidance", "hard_by_state", "differ"),
    [("token", True, True), ("token", False, False), ("sequence", True, False), ("sequence", False, False)],
)
def test_only_what_knows_tokens_gives_them_gradients_of_their_own(guidance, hard_by_state, differ):
    router = DynamicRouter(TOY, 4, torch.tensor([0.0, 1.0]))
    routed = RoutedPass(router, torch.tensor([0.5]), torch.Generator().manual_seed(seed(0)), 1.0)
    for block in range(len(TOY)):
        routed.choose(block, STATES)
    chosen = routed.chosen.detach().requires_grad_()
    routed._chosen = {block: chosen[..., block, :] for block in range(len(TOY))}
    (gradient,) = torch.autograd.grad(toy(guidance, hard_by_state).predicted(routed), chosen)
    skipping = gradient[0, :-1, MLP, 0]
    assert skipping.abs().max() > 0
    spread = (skipping.max() - skipping.min()).item() / skipping.abs().max().item()
    assert spread > 0.9 if differ else spread < 1e-5


# --- what does not fit together ---------------------------------------------------------------------------------

BUDGETS = callbacks.BudgetSampling
GUIDANCE = callbacks.SurrogateGuidance


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        ({}, lambda: [BUDGETS(k=2)], "nothing guides the router"),
        ({"guidance": "sequence"}, lambda: [BUDGETS(k=2)], "nothing guides the router"),
        (
            {"guidance": "backbone"},
            lambda: [BUDGETS(), GUIDANCE()],
            "guidance: backbone trains the router without a surrogate; take callbacks.SurrogateGuidance out",
        ),
        ({}, lambda: [GUIDANCE()], "no budgets to train for"),
        ({}, lambda: [BUDGETS(k=5), GUIDANCE()], "plans 5 budgets, but a batch has 4 sequences"),
        ({}, lambda: [BUDGETS(cost="flops"), GUIDANCE()], "leave them out"),
        ({"cost": "kv_bytes"}, lambda: [BUDGETS(), GUIDANCE()], "the same whatever a dynamic router chooses"),
        ({"cost": "latency"}, lambda: [BUDGETS(), GUIDANCE()], "no cost 'latency'"),
        ({"budgets": [0.1]}, lambda: [BUDGETS(), GUIDANCE()], "meets the budget 0.1: the smallest flops possible is"),
        ({}, lambda: [BUDGETS(), callbacks.FlextronCheckpointWriter(keep="best")], "set it to last"),
        ({"batch_size": 10**6}, lambda: [BUDGETS(), GUIDANCE()], "fewer than the 1000000 of one step"),
    ],
)
def test_what_does_not_fit_together_is_one_clear_error(static, tmp_path, settings, extra, message):
    stage = DynamicRouterTraining(str(static), **(SMALL | settings))
    with pytest.raises(ValueError, match=message):
        fit(stage, tmp_path, *extra(), max_steps=2, **({"limit_val_batches": 1} if "budgets" in settings else {}))


def test_it_starts_where_a_static_routers_stage_ended(elastic, static, tmp_path):
    with pytest.raises(ValueError, match="holds no static router, from whose answers"):
        fit(DynamicRouterTraining(str(elastic), **SMALL), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=r"set trainer.max_steps"):
        fit(DynamicRouterTraining(str(static), **SMALL), tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="holds no dynamic router for flops; it has none"):
        validated(DynamicRouterTraining(str(static), **SMALL), tmp_path, "validate")


def test_a_surrogate_of_sequences_has_to_be_there(static, tmp_path):
    folder = tmp_path / "flextron"
    checkpoint.extend(static, folder, files={}, without=(SURROGATE,))
    with pytest.raises(ValueError, match="holds no surrogate to start from"):
        guided(folder, tmp_path, guidance="sequence", steps=1)
    stale = TrainedSurrogate.read(static, checkpoint.read(static).space).stale_since("JointTuning")
    checkpoint.extend(static, folder, files={SURROGATE: stale.to_bytes()})
    with pytest.raises(ValueError, match="is stale: JointTuning changed the network"):
        guided(folder, tmp_path, guidance="sequence", steps=1)
    # that of tokens is made from nothing
    guided(folder, tmp_path, guidance="token", steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": "tokens"}, "guidance is one of backbone, token, sequence, not 'tokens'"),
        ({"budgets": [0.5, 1.5]}, "above 0 and at most 1, not 1.5"),
        ({"memory": 0}, "memory must be 1 or more, not 0"),
        ({"rank": 0}, "rank must be 1 or more, not 0"),
        ({"calibration_tokens": 0}, "calibration_tokens must be 1 or more"),
        ({"prices": 1}, "interpolation needs 2 or more, not 1"),
        ({"bias_learning_rate": 0.0}, "bias_learning_rate must be above 0"),
        ({"surrogate_batch_size": 0}, "surrogate_batch_size must be 1 or more"),
    ],
)
def test_a_number_out_of_range_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DynamicRouterTraining("x", **settings)


# --- what it writes ---------------------------------------------------------------------------------------------


def validated(stage, folder, what, *callbacks):
    """`validate`, `test` or `predict` of a checkpoint."""
    trainer = trainer_of(folder, *callbacks, limit_val_batches=None)
    stage.attach(training.text(tokenizer=stage.checkpoint))
    return getattr(trainer, what)(stage)


def test_the_checkpoint_holds_router_and_prices_and_what_was_there(trained, static):
    stage, folder = trained
    assert checkpoint.verify(folder)
    (router,) = TrainedDynamicRouter.read_all(folder, stage.backbone.space)
    assert router.prices == stage.prices
    assert router.table == stage.table
    assert router.settings["guidance"] == "token"
    assert router.settings["router_moves"] == stage.moves > 0
    for name, tensor in stage.router.state_dict().items():
        assert torch.equal(router.network.state_dict()[name], tensor)
    assert router.network.weight.any()
    assert {path.name for path in static.glob("routers/*")} < {path.name for path in folder.glob("routers/*")}
    assert (folder / "model.safetensors").stat().st_ino == (static / "model.safetensors").stat().st_ino
    history = checkpoint.read(folder).history
    assert history[-1]["stage"] == "DynamicRouterTraining"
    assert history[-1]["tokens"] == 30 * 4 * 32


def test_the_written_checkpoint_validates_to_the_runs_last_table(trained, tmp_path):
    stage, folder = trained
    again = DynamicRouterTraining(str(folder), **SMALL)
    validated(again, tmp_path, "validate")
    assert again.result.rows(0) == stage.result.rows(0)
    assert again.result.metrics("val") == stage.result.metrics("val")
    names = list(again.watched)
    assert names[0] == "full"
    assert names[-4:] == ["dynamic0.90", "dynamic0.80", "dynamic0.70", "dynamic0.60"]
    assert "routed0.70" in names
    # a budget between those that were priced costs what the price between costs on this text
    other = DynamicRouterTraining(str(folder), **SMALL, budgets=[0.75])
    validated(other, tmp_path, "validate")
    (loader,) = other.val_dataloader()
    policy = DynamicPolicy(other.router, other.table, [0.75], [stage.prices.at(0.75)])
    for own, expected in zip(other.watched["dynamic0.75"].selection.biases, policy.biases, strict=True):
        assert torch.equal(own, expected)
    cost = other.result.metrics("val")["val/dynamic0.75/stories/cost"]
    assert cost == pytest.approx(cost_of(other, policy, loader))


def test_the_written_checkpoint_is_tested_and_predicts(trained, tmp_path):
    _, folder = trained
    tested = DynamicRouterTraining(str(folder), **SMALL)
    validated(tested, tmp_path, "test")
    metrics = tested.result.metrics("test")
    (loader,) = tested.test_dataloader()
    for budget in (0.6, 0.9):
        policy = DynamicPolicy(tested.router, tested.table, [budget], [tested.prices.at(budget)])
        cost = metrics[f"test/dynamic{budget:.2f}/stories/cost"]
        assert cost == pytest.approx(cost_of(tested, policy, loader))
    rows = validated(DynamicRouterTraining(str(folder), **SMALL), tmp_path, "predict")
    assert set(rows[0]["loss"]) == set(tested.watched)
    for name in ("full", "dynamic0.60"):
        total = sum(loss * count for row in rows for loss, count in zip(row["loss"][name], row["tokens"], strict=True))
        tokens = sum(count for row in rows for count in row["tokens"])
        assert total / tokens == pytest.approx(metrics[f"test/{name}/stories/loss"], abs=1e-5)


def test_a_report_counts_one_cost_also_where_the_static_router_was_for_another(static, tmp_path):
    stage, _ = guided(static, tmp_path, settings={"cost": "decode_flops"}, steps=1, limit_val_batches=1)
    assert stage.static.table.name == "flops"
    assert stage.result.costs.name == stage.table.name == "decode_flops"
    assert not any(name.startswith("routed") for name in stage.watched)
    full = COUNTED["decode_flops"](stage.backbone, Workload()).full
    rows = {row["sub_network"]: row["decode_flops"] for row in stage.result.rows(0)}
    assert rows["full"] == pytest.approx(full)
    # after one step the router does not tell tokens apart, so this text costs what the calibration mix does
    assert not stage.router.weight.any()
    assert rows["dynamic0.90"] <= (1 + TOLERANCE) * 0.9 * full


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.fixture
def config(static, tmp_path):
    """A run of ten steps with a table before, between and after, as a user writes it."""
    path = tmp_path / "dynamic.yaml"
    guidance = {"class_path": "callbacks.SurrogateGuidance", "init_args": {**GUIDE, "window": 64}}
    trainer = {
        "accelerator": "cpu",
        "precision": "32-true",
        "max_steps": 10,
        "val_check_interval": 5,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "callbacks": [
            {"class_path": "callbacks.BudgetSampling", "init_args": {"k": 2}},
            guidance,
            {"class_path": "callbacks.ExactResume", "init_args": {"every_n_steps": 3}},
        ],
    }
    stage = {**SMALL, "checkpoint": str(static), "budgets": [0.7]}
    model = {"class_path": "flextron_lit.stages.DynamicRouterTraining", "init_args": stage}
    path.write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
    return path


def command(config, folder, *kills):
    """With a kill for each moment and step."""
    added = []
    for moment, step in kills:
        init = {"marker": str(folder.parent / moment), "moment": moment, "step": step}
        added += ["--trainer.callbacks+", json.dumps({"class_path": "tests.kills.KillOnce", "init_args": init})]
    return ("fit", "-c", "configs/data/generated.yaml", "-c", config, "--run_folder", folder, *added)


def test_a_run_that_was_killed_twice_ends_like_an_undisturbed_one(config, tmp_path):
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    succeed(*command(config, undisturbed))
    # the second kill comes when there is nothing left to train or validate
    killing = command(config, folder, ("train_batch_end", 8), ("fit_end", 10))
    for _ in range(2):
        killed = run(*killing)
        assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    succeed(*killing)
    names = [path.relative_to(undisturbed) for path in undisturbed.glob("flextron/routers/*")]
    assert len(names) == 4
    for name in names:
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert table(folder) == table(undisturbed)
    assert logged(folder) == logged(undisturbed)
    assert {row["step"] for row in table(folder)} == {0, 5, 10}
    # every step was another
    gaps = logged(folder)["train/cost_gap"]
    assert [step for step, _ in gaps] == list(range(1, 11))
    assert len({value for _, value in gaps}) == 10


# test_ranks_together.py has two processes of every stage
@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["token", "backbone"])
def test_two_ranks_end_with_the_same_router(guidance, static, tmp_path):
    script = Path(__file__).parent / "two_routers.py"
    arguments = [sys.executable, str(script), str(static), str(tmp_path), guidance]
    done = subprocess.run(
        arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name in ("weight", "bias", "surrogate", "memory"):
        assert torch.equal(one[name], two[name]), name
    assert one["prices"] == two["prices"]
    assert not torch.equal(one["batch"], two["batch"])
    # the router learned; the surrogate from the tokens of both ranks
    assert one["weight"].any()
    assert one["moves"] == (4 if guidance == "backbone" else 3)
    assert (len(one["memory"]) > 4 * 4 * 31) == (guidance == "token")
