"""Joint tuning in process: gradients for backbone and router, measured answers, what becomes stale."""

import csv
import dataclasses
import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from flextron_lit import callbacks, checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.commands import reroute as rerouting
from flextron_lit.commands import select as selecting
from flextron_lit.costs import COUNTED, Workload, dynamic_table
from flextron_lit.elastic.unit_gates import for_all_tokens, gated
from flextron_lit.losses.cross_entropy import mean_cross_entropy
from flextron_lit.losses.measured_loss import MeasuredLoss, batches_of
from flextron_lit.routers.budget_prices import TOLERANCE, Priced, Prices
from flextron_lit.routers.dynamic import DynamicRouter
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.routers.from_budget import Routing
from flextron_lit.routers.from_surrogate import train_router
from flextron_lit.routers.ladder import candidates, worth_measuring
from flextron_lit.routers.noise import Temperature
from flextron_lit.routers.objective import CostPenalty, route
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter, TrainedSurrogate
from flextron_lit.stages import ElasticTraining, JointTuning, Remeasuring, StaticRouterTraining, SurrogateTraining
from tests import options, served
from tests.front_door import in_own_process
from tests.runs import table
from tests.stages.prices import Solved
from tests.stages.training import Gradients, stage, sum_of_losses, text

BUDGETS = (0.45, 0.8)
SMALL = Remeasuring(candidates=12, tokens=128, block_size=32)


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A checkpoint with a surrogate and routers for two costs, all of them barely trained."""
    folder = tmp_path_factory.mktemp("routed")
    elastic = stage(optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3), clip_norm=1.0)
    fit(elastic, folder, callbacks.BudgetSampling(k=2), callbacks.FlextronCheckpointWriter(), steps=200)
    start = str(folder / "flextron")
    surrogate = SurrogateTraining(
        start, pairs=32, held_out=4, tokens=128, block_size=32, batch_size=16, attn_implementation="eager"
    )
    fit(surrogate, folder, steps=20)
    trained = dataclasses.replace(surrogate.trained, settings=surrogate.settings())
    files = surrogate.files()
    for cost in ("parameters", "flops"):
        costs = COUNTED[cost](surrogate.backbone, Workload())
        files |= train_router(surrogate.backbone.space, costs, trained, steps=30, seed=options.seed(0)).files()
    checkpoint.extend(folder / "flextron", folder / "routed", files=files)
    return folder / "routed"


class Budgets(Callback):
    """The same budgets at every step, and what was drawn for them at the first."""

    def __init__(self, budgets=BUDGETS):
        self.budgets, self.drawn = budgets, []

    def on_fit_start(self, trainer, pl_module):
        pl_module.add_loss_term("seen", self.see)

    def see(self, done):
        if len(self.drawn) < 1 + len(self.budgets):
            self.drawn.append(done.sub_network)
        return 0.0 * done.logits.sum()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.plan = self.budgets


class RouterGradients(Callback):
    """Keeps a router's weights before the first update, and their gradients."""

    def __init__(self, index=0):
        self.index, self.kept = index, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.kept is None:
            self.weights = {n: p.detach().clone() for n, p in pl_module.routers[self.index].named_parameters()}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.kept is None:
            self.kept = {
                n: None if p.grad is None else p.grad.clone()
                for n, p in pl_module.routers[self.index].named_parameters()
            }


def tuning(folder, **settings):
    defaults = {"cost": "parameters", "clip_norm": 1e9, "remeasuring": SMALL}
    return JointTuning(str(folder), **(defaults | settings))


def fit(module, folder, *others, steps=1, ckpt_path=None, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=list(others),
        **({"limit_val_batches": 0, "enable_checkpointing": False} | settings),
    )
    data = module.attach(text(tokenizer=module.checkpoint))
    trainer.ckpt_path = ckpt_path
    trainer.fit(module, datamodule=data)
    return trainer


def tuned_folder(routed, folder, steps=6, **settings):
    module = tuning(routed, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3), **settings)
    fit(module, folder, callbacks.BudgetSampling(k=2), callbacks.FlextronCheckpointWriter(), steps=steps)
    return folder / "flextron"


@pytest.fixture(scope="module")
def tuned(routed, tmp_path_factory):
    return tuned_folder(routed, tmp_path_factory.mktemp("tuned"))


def router_for(folder, cost, space):
    return next(router for router in TrainedRouter.read_all(folder, space) if router.table.name == cost)


# --- gradients --------------------------------------------------------------------------------------------------


FROM_LADDER = {"train_router": False, "draws": "ladder"}


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}, {"train_router": False}, FROM_LADDER])
def test_the_backbone_gets_the_gradients_of_what_the_router_drew(routed, tmp_path, settings):
    module, budgets, kept, router = tuning(routed, **settings), Budgets(), Gradients(), RouterGradients()
    fit(module, tmp_path, budgets, kept, router)
    assert budgets.drawn[0] == module.backbone.space.full()
    module.model.load_state_dict(kept.weights, strict=False)
    expected = sum_of_losses(module, kept.batches, budgets.drawn[1:])
    assert all(torch.allclose(kept.kept[n], g, rtol=1e-3, atol=1e-6) for n, g in expected.items())
    without = sum_of_losses(module, kept.batches, budgets.drawn[1:2])
    assert not all(torch.allclose(kept.kept[n], g, rtol=1e-3, atol=1e-6) for n, g in without.items())
    moved = [not torch.equal(p, router.weights[n]) for n, p in module.routers[0].named_parameters()]
    assert all(moved) if "train_router" not in settings else not any(moved)


def test_what_budgets_get_is_trained_and_nothing_else_by_a_ladder_measured_first(routed, tmp_path):
    class Started(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                self.ladder = pl_module.ladder

    module, budgets, started = tuning(routed, **FROM_LADDER), Budgets(), Started()
    fit(module, tmp_path, budgets, started, steps=2)
    assert started.ladder.measured
    answers = [started.ladder.at(budget * module.table.full).sub_network for budget in BUDGETS]
    assert budgets.drawn[1:] == answers
    # a budget below what the smallest network costs gets that one
    assert module.tuned[0].answered(0.0).selection == module.ladder.rungs[0].sub_network
    drawn = Budgets()
    fit(tuning(routed, train_router=False), tmp_path, drawn, steps=2)
    assert drawn.drawn[1:] != answers


@pytest.mark.parametrize(
    "settings", [{"draws": "ladder"}, FROM_LADDER | {"router": "both"}, {"draws": "surrogate"}], ids=str
)
def test_draws_that_train_nothing_are_refused(settings):
    with pytest.raises(ValueError, match="draws"):
        tuning("nowhere", **settings)


def test_answers_of_the_excess_losses_are_measured_too(routed, tmp_path):
    module = tuning(routed)
    fit(module, tmp_path, Budgets())
    space, asked = module.backbone.space, []
    module.excess = ExcessTable(tuple(tuple(float(w < b.full) for w in b.widths) for b in space.blocks), 1)
    measured = module.losses_of
    module.losses_of = lambda chosen, *about: asked.extend(chosen) or measured(chosen, *about)
    module.tuned[0].remeasure(module, SMALL)
    answers = candidates(module.routers[0], space, module.table, module.tuned[0].trained.ladder, module.excess)[2]
    assert len(asked) <= SMALL.candidates
    assert len(set(asked) & set(answers)) >= min(len(answers), SMALL.candidates // 3)
    assert len({*answers} - {space.full(), space.smallest()}) > 2


def test_the_router_gets_the_gradients_of_the_text_and_of_the_cost(routed, tmp_path):
    penalty, temperature = CostPenalty(weight=3.0, one_sided=False), Temperature(start=0.7, end=0.7)
    module = tuning(routed, penalty=penalty, temperature=temperature, seed=5)
    kept, router = Gradients(), RouterGradients()
    fit(module, tmp_path, Budgets(), kept, router)
    module.model.load_state_dict(kept.weights, strict=False)
    module.routers[0].load_state_dict(router.weights, strict=False)
    (batch,) = kept.batches

    def gradients(seed, text_counts=True):
        module.routers[0].zero_grad()
        generator = torch.Generator().manual_seed(seed)
        for budget in BUDGETS:
            drawn = route(module.routers[0], torch.tensor([budget]), generator, 0.7)
            with gated(module.backbone, for_all_tokens(drawn.probabilities[0])):
                loss = mean_cross_entropy(module.predictions(batch).logits, batch["labels"])
            (text_counts * loss + penalty.of(drawn.ratios(module.table), drawn.budgets)).backward()
        return {n: p.grad.clone() for n, p in module.routers[0].named_parameters()}

    def equal(expected):
        return all(torch.allclose(router.kept[n], g, rtol=1e-3, atol=1e-7) for n, g in expected.items())

    assert equal(gradients(5))
    assert not equal(gradients(6))
    assert not equal(gradients(5, text_counts=False))


def test_training_helps_what_the_router_chooses(tmp_path):
    """Against the same run with learning rates of 0: nothing then changes but the ladder, which is measured.

    Of random weights, which any training helps by far more than chance.
    """
    folder, means = served.write(tmp_path / "untrained", routers=(served.static_router,)), {}
    for rate in (0.0, 3e-3):
        module = tuning(
            folder,
            optimizer=lambda params, rate=rate: torch.optim.AdamW(params, lr=rate, weight_decay=0.0),
            router_optimizer=lambda params, rate=rate: torch.optim.Adam(params, lr=rate),
        )
        fit(module, tmp_path, callbacks.BudgetSampling(k=1), steps=25)
        rungs = [module.ladder.at(budget * module.table.full) for budget in BUDGETS]
        means[rate] = sum(rung.loss for rung in rungs) / len(rungs)
        before = router_for(folder, "parameters", module.backbone.space).network.state_dict()
        same = all(torch.equal(value, before[name]) for name, value in module.routers[0].state_dict().items())
        assert same == (rate == 0)
    assert means[3e-3] < means[0.0] - 0.5


def test_what_is_not_finite_in_the_router_stops_before_the_update(routed, tmp_path):
    class Poison(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 1:
                next(pl_module.routers[0].parameters()).grad[0, 0] = float("inf")

    with pytest.raises(ValueError, match=r"update of step 2: the router gradient norm is inf.*for the budget 0.450"):
        fit(tuning(routed), tmp_path, Budgets(), Poison(), steps=3)


# --- what the router answers ------------------------------------------------------------------------------------


def test_the_losses_of_the_ladder_are_those_of_its_sub_networks(routed, tuned):
    loaded = load_elastic(str(tuned))
    router = router_for(tuned, "parameters", loaded.backbone.space)
    assert router.ladder.measured
    assert json.loads((tuned / f"routers/{router.name}.json").read_text())["losses"] == "measured"
    data = text(tokenizer=str(tuned))
    data.prepare_data()
    blocks = data.calibration_batches(SMALL.tokens, block_size=SMALL.block_size, batch_size=1)
    batches = batches_of({name: torch.cat([b[name] for b in blocks]) for name in blocks[0]}, SMALL.batch_size)
    earlier = router_for(routed, "parameters", loaded.backbone.space).ladder
    series = candidates(router.network, loaded.backbone.space, router.table, earlier)
    chosen = worth_measuring(series, SMALL.candidates)
    rungs = [rung for rung in router.ladder.rungs if rung.sub_network in chosen]
    # what lies between measured ones is no better than both, so both ends of the ladder were measured
    assert {router.ladder.rungs[0], router.ladder.rungs[-1]} <= set(rungs)
    losses = {}
    for name, folder in (("tuned", tuned), ("before", routed)):
        measured = MeasuredLoss(load_elastic(str(folder)).backbone, batches)
        losses[name] = [measured(rung.sub_network) for rung in rungs]
    assert [rung.loss for rung in rungs] == pytest.approx(losses["tuned"], abs=1e-5)
    assert [rung.loss for rung in rungs] != pytest.approx(losses["before"], abs=1e-4)
    found = [rung.loss for rung in router.ladder.rungs]
    assert found == sorted(found, reverse=True)
    costs = [rung.cost for rung in router.ladder.rungs]
    assert costs == [router.table.cost(rung.sub_network) for rung in router.ladder.rungs]
    assert costs[0] == pytest.approx(router.table.smallest)


def test_the_table_of_the_last_step_is_of_the_new_answers(routed, tmp_path):
    module = tuning(routed, budgets=list(BUDGETS))
    report = [callbacks.ParetoReport(), callbacks.RouterReport()]
    validate = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "val_check_interval": 4}
    started = router_for(routed, "parameters", checkpoint.read(routed).space).ladder
    first = []

    class First(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            first.append(pl_module.watched["routed0.45"].selection)

    fit(
        module,
        tmp_path,
        callbacks.BudgetSampling(),
        First(),
        *report,
        steps=4,
        check_val_every_n_epoch=None,
        **validate,
    )
    limit = BUDGETS[0] * module.table.full
    assert first == [started.at(limit).sub_network]
    assert module.watched["routed0.45"].selection == module.ladder.at(limit).sub_network
    rows = [row for row in table(tmp_path) if row["sub_network"] == "routed0.45"]
    assert [row["step"] for row in rows] == [0, 4]
    assert rows[1]["parameters"] == pytest.approx(module.ladder.at(limit).cost)
    with (tmp_path / "ladder.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [float(row["measured_loss"]) for row in written] == [rung.loss for rung in module.ladder.rungs]


# --- dynamic ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed_by_token(routed, tmp_path_factory):
    """The same checkpoint with a dynamic router that starts from the static one, its map random, its prices a guess."""
    backbone = load_elastic(str(routed)).backbone
    space, table = backbone.space, dynamic_table(backbone, "flops", Workload())
    knots = torch.linspace(table.smallest_ratio, 1.0, 3)
    router = DynamicRouter(space, backbone.model.config.hidden_size, knots)
    features = torch.ones(len(space), router.weight.shape[-1])
    router.start([space.smallest(), space.uniform(0.5, 0.5), space.full()], space, 0 * features, features)
    with torch.no_grad():
        router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(options.seed(0)))
    prices = Prices(tuple(Priced(budget, 0.0, budget, 9.0) for budget in (0.7, 0.8, 0.9)))
    folder = tmp_path_factory.mktemp("dynamic") / "flextron"
    trained = TrainedDynamicRouter(router, table, prices, settings={"bias_learning_rate": 5.0})
    checkpoint.extend(routed, folder, files=trained.files())
    return folder


class Unmoved(Callback):
    """The router's map is 0, so that every token draws by its own noise, and no rounding of its state decides."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            pl_module.routers[0].weight.zero_()


def apart(one, other):
    """Of two lists of gradients, how far they are apart, against the first."""
    return float((one - other).norm() / one.norm())


def test_tokens_get_their_own_gradients_with_gates_as_in_groups(routed_by_token, tmp_path):
    gradients, router = {}, RouterGradients()
    for name, settings in {
        "gates": {},
        "checkpointing": {"activation_checkpointing": True},
        "groups": {"train_router": False},
        "other noise": {"seed": 1},
    }.items():
        module = tuning(routed_by_token, router="dynamic", cost="flops", **settings)
        kept, watched = Gradients(), RouterGradients()
        fit(module, tmp_path, Unmoved(), Budgets((0.75, 0.85)), kept, watched)
        gradients[name] = torch.cat([gradient.flatten() for gradient in kept.kept.values()])
        moved = [not torch.equal(p, watched.weights[n]) for n, p in module.routers[0].named_parameters()]
        assert moved == [module.options.train_router] * 2
        router = watched if name == "gates" else router
    for name in ("checkpointing", "groups"):
        assert apart(gradients["gates"], gradients[name]) < 1e-4
    assert apart(gradients["gates"], gradients["other noise"]) > 1e-2
    assert all(gradient.abs().sum() > 0 for gradient in router.kept.values())


def test_a_dynamic_router_gets_new_prices(routed_by_token, tmp_path, monkeypatch):
    settings = {"router": "dynamic", "cost": None}
    # at prices like these no logit keeps a token from the cheapest choice, so every budget is missed
    (known,) = TrainedDynamicRouter.read_all(routed_by_token, checkpoint.read(routed_by_token).space)
    wrong = Prices(tuple(dataclasses.replace(row, price=50.0) for row in known.prices.rows))
    start = tmp_path / "start"
    checkpoint.extend(routed_by_token, start, files=dataclasses.replace(known, prices=wrong).files())
    solved = Solved(monkeypatch)
    module = tuning(start, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3), **settings)
    validate = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "val_check_interval": 6}
    callers = [callbacks.BudgetSampling(), callbacks.FlextronCheckpointWriter(), callbacks.ParetoReport()]
    fit(module, tmp_path, *callers, callbacks.RouterReport(), steps=6, check_val_every_n_epoch=None, **validate)
    assert [row["step"] for row in table(tmp_path) if row["sub_network"] == "dynamic0.90"] == [0, 6]
    folder = tmp_path / "flextron"
    space = module.backbone.space
    (before,), (after,) = (TrainedDynamicRouter.read_all(each, space) for each in (start, folder))
    assert (after.stale, {router.stale for router in TrainedRouter.read_all(folder, space)}) == (None, {"JointTuning"})
    # so that the next stage lets the biases learn as fast
    assert after.settings["bias_learning_rate"] == 5.0
    batches = batches_of(module.text_to_measure_on(SMALL.tokens, SMALL.block_size), SMALL.batch_size)
    module.model.eval()
    for row in after.prices.rows:
        ratio, loss = module.run_policy(after.policy([row.budget]), batches)
        assert ratio <= (1 + TOLERANCE) * row.budget
        assert (ratio, loss) == pytest.approx((row.ratio, row.loss), abs=1e-5)
    solved.check(after.prices, after.table)
    reached = [module.run_policy(before.policy([row.budget]), batches)[0] for row in before.prices.rows]
    assert reached == pytest.approx([before.table.smallest_ratio] * len(reached))
    assert max(reached) < (1 - 5 * TOLERANCE) * min(row.budget for row in before.prices.rows)


def test_both_routers_are_tuned_at_once_and_neither_is_stale(routed_by_token, tmp_path):
    module, watched = tuning(routed_by_token, router="both", cost="flops"), [RouterGradients(), RouterGradients(1)]
    validate = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "val_check_interval": 4}
    callers = [callbacks.FlextronCheckpointWriter(), callbacks.ParetoReport(), callbacks.RouterReport()]
    # below what every token with the keys and values of all groups can meet: the dynamic router takes its lowest
    fit(module, tmp_path, Budgets((0.5, 0.9)), *callers, *watched, steps=4, check_val_every_n_epoch=None, **validate)
    for index, kept in enumerate(watched):
        assert all(gradient.abs().sum() > 0 for gradient in kept.kept.values())
        assert any(not torch.equal(p, kept.weights[n]) for n, p in module.routers[index].named_parameters())
    assert {"routed0.90", "dynamic0.90"} <= {row["sub_network"] for row in table(tmp_path)}
    folder, space = tmp_path / "flextron", module.backbone.space
    assert [router.stale for router in TrainedDynamicRouter.read_all(folder, space)] == [None]
    assert {router.table.name: router.stale for router in TrainedRouter.read_all(folder, space)} == {
        "flops": None,
        "parameters": "JointTuning",
    }


# --- what becomes stale -----------------------------------------------------------------------------------------


def test_what_was_not_tuned_is_stale_and_says_so(routed, tuned):
    space = checkpoint.read(tuned).space
    assert TrainedSurrogate.read(tuned, space).stale == "JointTuning"
    assert {router.table.name: router.stale for router in TrainedRouter.read_all(tuned, space)} == {
        "parameters": None,
        "flops": "JointTuning",
    }
    assert [row["stage"] for row in checkpoint.read(tuned).history][-1] == "JointTuning"
    tables = {name: COUNTED[name](load_elastic(str(tuned)).backbone, Workload()) for name in COUNTED}
    answers = {
        name: {
            budget: routing.answer(routing.parse(budget))
            for budget in ("parameters<=0.5", "flops<=0.5", "parameters<=0.5,kv_bytes<=0.5")
        }
        for name, routing in (
            ("tuned", Routing.read(tuned, space, tables)),
            ("before", Routing.read(routed, space, tables)),
        )
    }
    looked_up, other, searched = answers["tuned"].values()
    assert looked_up.how == "a look-up in the ladder of the router for parameters, with losses that were measured"
    assert looked_up.measured
    assert "this router is stale: JointTuning has changed the network since" in other.how
    assert "this surrogate is stale: JointTuning has changed the network since" in searched.how
    assert not other.measured
    assert not any("stale" in answer.how or answer.measured for answer in answers["before"].values())


def test_nothing_is_trained_by_a_stale_surrogate(routed, tuned, tmp_path):
    arguments = ["--cost", "kv_bytes", "--steps", "2"]
    with pytest.raises(ValueError, match="is stale: JointTuning changed the network.*run the surrogate stage again"):
        rerouting.command(["--checkpoint", str(tuned), *arguments])
    guide = [callbacks.BudgetSampling(k=2), callbacks.SurrogateGuidance()]
    with pytest.raises(ValueError, match="is stale: JointTuning changed the network"):
        fit(StaticRouterTraining(str(tuned), cost="flops"), tmp_path, *guide, steps=2)
    checkpoint.extend(routed, tmp_path / "before", files={})
    rerouting.command(["--checkpoint", str(tmp_path / "before"), *arguments])


def test_a_fresh_surrogate_leaves_the_tuned_router_and_drops_the_stale_one(tuned, tmp_path):
    module = SurrogateTraining(str(tuned), pairs=16, held_out=2, tokens=64, block_size=32, batch_size=16)
    fit(module, tmp_path, callbacks.FlextronCheckpointWriter(), steps=2)
    space = checkpoint.read(tuned).space
    assert TrainedSurrogate.read(tmp_path / "flextron", space).stale is None
    (kept,) = TrainedRouter.read_all(tmp_path / "flextron", space)
    assert kept.ladder == router_for(tuned, "parameters", space).ladder


def test_elastic_training_makes_everything_stale_and_joint_tuning_mends_what_it_tunes(tuned, tmp_path):
    space = checkpoint.read(tuned).space
    module = ElasticTraining(str(tuned))
    fit(module, tmp_path, callbacks.BudgetSampling(), callbacks.FlextronCheckpointWriter())
    folder = tmp_path / "flextron"
    assert TrainedSurrogate.read(folder, space).stale == "JointTuning"
    stale = {router.table.name: router.stale for router in TrainedRouter.read_all(folder, space)}
    assert stale == {"parameters": "ElasticTraining", "flops": "JointTuning"}
    again = tuned_folder(folder, tmp_path / "again", steps=1, cost="flops")
    stale = {router.table.name: router.stale for router in TrainedRouter.read_all(again, space)}
    assert stale == {"parameters": "ElasticTraining", "flops": None}


def test_another_space_knows_nothing_of_routers(tuned, tmp_path):
    space = dataclasses.replace(stage().options.space, mlp=[0, 64, 128])
    fit(
        ElasticTraining(str(tuned), space=space),
        tmp_path,
        callbacks.BudgetSampling(),
        callbacks.FlextronCheckpointWriter(),
    )
    assert not (tmp_path / "flextron/routers").exists()
    assert not (tmp_path / "flextron/elastic/surrogate.safetensors").exists()


# --- runs -------------------------------------------------------------------------------------------------------


class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 5:
            raise RuntimeError("stopped")


@pytest.mark.parametrize("kind", ["static", "dynamic", "both", "ladder"])
def test_a_run_that_resumes_ends_like_one_that_was_not_interrupted(kind, routed_by_token, tmp_path):
    how = FROM_LADDER if kind == "ladder" else {"router": kind}

    def attempt(name, *others, ckpt_path=None):
        module = tuning(routed_by_token, cost="flops", **how)
        always = [callbacks.BudgetSampling(k=2), callbacks.FlextronCheckpointWriter(), callbacks.ExactResume(4)]
        fit(module, tmp_path / name, *always, *others, steps=8, ckpt_path=ckpt_path, enable_checkpointing=True)
        return module

    whole = attempt("whole")
    with pytest.raises(RuntimeError, match="stopped"):
        attempt("killed", Stop())
    state = RunFolder(tmp_path / "killed").resume_state
    assert torch.load(state, weights_only=True)["global_step"] == 4
    resumed = attempt("killed", ckpt_path=state)
    for name in ("model", "routers"):
        one, other = getattr(whole, name).state_dict(), getattr(resumed, name).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert [tuned.state() for tuned in whole.tuned] == [tuned.state() for tuned in resumed.tuned]
    files = {str(p.relative_to(tmp_path / "whole")) for p in (tmp_path / "whole/flextron").rglob("*") if p.is_file()}
    for file in files - {"flextron/flextron.json"}:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes(), file
    # stopped behind the last step, before anything was measured
    behind = attempt("killed", ckpt_path=RunFolder(tmp_path / "whole").resume_state)
    assert [tuned.state() for tuned in behind.tuned] == [tuned.state() for tuned in whole.tuned]
    # another seed of the noise would have ended elsewhere, and so would other budgets
    other = tuning(routed_by_token, cost="flops", seed=1, **how)
    fit(other, tmp_path / "other", callbacks.BudgetSampling(k=3 if kind == "ladder" else 2), steps=8)
    which = "model" if kind == "ladder" else "routers"
    weights = (getattr(module, which).parameters() for module in (whole, other))
    assert not all(torch.equal(one, another) for one, another in zip(*weights, strict=True))


# test_ranks_together.py has two processes of every stage
@pytest.mark.slow
def test_two_ranks_through_the_front_door_then_select(routed, tmp_path, capsys):
    config = (
        "-c",
        "configs/stages/joint_tuning.yaml",
        "-c",
        "configs/data/generated.yaml",
        "-c",
        "configs/trainer/cpu.yaml",
    )
    settings = {
        "model": {
            "init_args": {"cost": "parameters", "remeasuring": {"candidates": 12, "tokens": 128, "block_size": 32}}
        },
        "trainer": {
            "max_steps": 4,
            "val_check_interval": 4,
            "precision": "bf16-mixed",
            "devices": 2,
            "strategy": "ddp",
        },
    }
    folder = tmp_path / "run"
    start = ("-c", json.dumps(settings), "--model.init_args.checkpoint", routed, "--run_folder", folder)
    done = in_own_process("fit", *config, *start)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "losses are measured" in done.stderr
    assert {row["sub_network"] for row in table(folder)} >= {"full", "routed0.70"}
    selecting.command(["--checkpoint", str(folder), "--budget", "parameters<=0.6", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["costs"]["parameters"]["ratio"] <= 0.6
    assert found["predicted_loss"] is None
    assert found["calibration_loss"] > 0
    assert "with losses that were measured" in found["how"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost": None}, "holds several static routers; set cost to one of flops-.*parameters-"),
        ({"cost": "latency"}, "holds no static router for latency, it has those for flops-.*parameters-"),
        ({"budgets": [0.01]}, "no sub-network meets the budget 0.01"),
    ],
)
def test_a_router_that_is_not_there_is_one_clear_error(routed, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(tuning(routed, **settings), tmp_path, callbacks.BudgetSampling())


def test_what_does_not_fit_is_refused(routed, tmp_path):
    with pytest.raises(ValueError, match="is no Flextron checkpoint, and JointTuning starts from one"):
        fit(tuning("random:configs/models/tiny-llama"), tmp_path, callbacks.BudgetSampling())
    with pytest.raises(ValueError, match="this step has no budgets to train"):
        fit(tuning(routed), tmp_path)
    with pytest.raises(ValueError, match="router is one of static, dynamic, both, not 'greedy'"):
        tuning(routed, router="greedy")
    with pytest.raises(ValueError, match="above 0 and at most 1, not 1.5"):
        tuning(routed, budgets=[1.5])
    with pytest.raises(ValueError, match="candidates must be 6 or more, not 5"):
        Remeasuring(candidates=5)
