"""From a budget to a sub-network: the pipeline of all stages, and what its checkpoint answers."""

import copy
import dataclasses
import json
import re
import signal

import pytest
import torch

from flextron_lit import FlextronModel, checkpoint
from flextron_lit.callbacks.tensorboard import LAYOUT
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.costs import COUNTED, CostTable, Workload
from flextron_lit.costs.budget import Limit
from flextron_lit.routers.from_budget import Routing
from flextron_lit.routers.surrogate import ridge
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter, TrainedSurrogate
from flextron_lit.space import SubNetwork
from tests.front_door import fail, in_own_process, run, succeed
from tests.runs import compared_by, equal, logged, pictures, table, weights

PIPELINE = ("pipeline", "-c", "configs/debug_pipeline.yaml")


@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    """The folder of the debug pipeline, and what it printed."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = run(*PIPELINE, "--run_folder", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


@pytest.fixture(scope="module")
def routed(piped):
    return piped[0] / "static_router"


@pytest.fixture(scope="module")
def loaded(routed):
    return load_elastic(str(routed / "flextron"))


def answer(folder, budget, *options):
    done = run("select", "--checkpoint", folder, "--budget", budget, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_stage_says_what_it_found(piped):
    _, printed = piped
    for said in (
        "ridge fit, held out: rank correlation",
        "surrogate, held out: rank correlation",
        "gate ",
        "routed0.70",
        "the ladder has",
        "pipeline finished: 5 of 5 stages",
    ):
        assert said in printed
    # how often the gate let it depends on how well the surrogate learned
    folder, _ = piped
    opened = [value for _, value in logged(folder / "static_router")["train/gate_open"]]
    assert set(opened) <= {0, 1}
    assert f"the router moved in {sum(opened):.0f} of 200 steps" in printed
    final = folder / "static_router/flextron"
    (router,) = TrainedRouter.read_all(final, checkpoint.read(final).space)
    assert router.settings["router_moves"] == sum(opened)


def test_the_pipeline_ends_with_one_table_and_shows_it_again(piped):
    folder, printed = piped
    rows = json.loads((folder / "summary.json").read_text())
    names = [f"{kind}{budget:.2f}" for budget in (0.9, 0.8, 0.7, 0.6) for kind in ("dynamic", "routed")]
    assert [row["name"] for row in rows] == ["full", *names]
    last = [row for row in table(folder / "joint_tuning") if row["step"] == 20]
    for row in rows:
        losses = {each["domain"]: each["loss"] for each in last if each["sub_network"] == row["name"]}
        assert row["losses"] == losses
        # budgets are of no latency, so nothing was timed
        assert "latency_ms" not in row
    loaded = load_elastic(str(folder / "joint_tuning/flextron"))
    parameters = COUNTED["parameters"](loaded.backbone, Workload())
    small = next(row for row in rows if row["name"] == "routed0.60")
    assert small["parameters"] == parameters.cost(loaded.answer("flops<=0.6").sub_network)
    assert {row["parameters"] for row in rows if row["router"] != "static"} == {parameters.full}
    shown = printed[printed.index("what each budget gets") :]
    (folder / "summary.csv").unlink()
    again = succeed(*PIPELINE, "--run_folder", folder)
    assert "5 of 5" in again
    assert shown.split("wrote")[0] in again
    # shown from what was written, not made again
    assert not (folder / "summary.csv").exists()
    assert again.count(" done ") == 5


def test_the_surrogate_is_compared_with_the_ridge_fit_on_what_was_held_out(piped):
    space = checkpoint.read(piped[0] / "surrogate/flextron").space
    kept = TrainedSurrogate.read(piped[0] / "surrogate/flextron", space)
    learned, checked = (kept.pairs.select(held_out=held_out) for held_out in (False, True))
    inputs = checked.one_hot(space)
    weight, bias = ridge(learned.one_hot(space).flatten(1), kept.targets(learned.losses))
    for name, predicted in (
        ("held_out_quality", kept.predict(inputs)),
        ("ridge_quality", inputs.flatten(1) @ weight + bias),
    ):
        predicted = kept.to_nats(predicted)
        error = (predicted - checked.losses).abs().mean()
        told = kept.settings[name]
        assert told["mean_absolute_error"] == pytest.approx(float(error), rel=1e-3)
        assert told["error_over_std"] == pytest.approx(float(error / checked.losses.std()), rel=1e-3)
        ranks = torch.stack([predicted, checked.losses]).argsort(-1).argsort(-1).double()
        assert told["rank_correlation"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=0.02)
    assert kept.settings["held_out_quality"] != kept.settings["ridge_quality"]
    rows = (piped[0] / "surrogate/surrogate.csv").read_text().splitlines()
    assert len(rows) == 1 + len(checked) == 1 + 40


def test_tensorboard_has_what_the_router_did(piped):
    folder, _ = piped
    surrogate, router = logged(folder / "surrogate"), logged(folder / "static_router")
    quality = ("mean_absolute_error", "error_over_std", "rank_correlation")
    assert {f"val/surrogate/{name}" for name in quality} <= surrogate.keys()
    names = ("predicted_loss", "cost_penalty", "surrogate_error", "entropy", "temperature", "gate_open", "gate_error")
    for name in (*names, "pairs", "cost_gap"):
        assert [step for step, _ in router[f"train/{name}"]] == list(range(1, 201)), name
    temperatures = [value for _, value in router["train/temperature"]]
    assert temperatures == sorted(temperatures, reverse=True)
    # every chart of the first page has something to show in some stage
    tags = {tag for stage in folder.glob("*/tensorboard") for tag, seen in logged(stage.parent).items() if seen}
    for chart, (_, patterns) in [each for charts in LAYOUT.values() for each in charts.items()]:
        assert any(re.match(pattern, tag) for pattern in patterns for tag in tags), chart
    assert logged(folder / "dynamic_router")["train/tokens_per_second"] == list(range(1, 41))
    assert not router["train/tokens_per_second"], "its batches are no text"
    assert pictures(folder / "surrogate") == {"surrogate/predicted against observed": [300]}
    figures = ("router/widths", "router/ladder", "val/loss against flops")
    assert pictures(folder / "static_router") == {figure: [0, 200] for figure in figures}
    assert set(compared_by(folder / "surrogate")[1]) == {f"val/surrogate/{name}" for name in quality}
    answers = [f"{kind}{budget:.2f}" for kind in ("routed", "dynamic") for budget in (0.9, 0.8, 0.7, 0.6)]
    assert set(compared_by(folder / "joint_tuning")[1]) == {f"val/{name}/mean/loss" for name in ("full", *answers)}
    for name in ("widths.png", "ladder.png", "training.png"):
        assert (folder / "static_router" / name).stat().st_size > 10_000
    header, *rungs = (folder / "static_router/ladder.csv").read_text().splitlines()
    assert header == "ratio,flops,predicted_loss,sub_network"
    ratios = [float(rung.split(",")[0]) for rung in rungs]
    assert ratios == sorted(ratios)
    assert ratios[-1] == 1.0


def test_the_network_stays_what_it_was_and_takes_no_room_twice(piped):
    folder, _ = piped
    one, two, three = (folder / name for name in ("elastic", "surrogate", "static_router"))
    assert equal(weights(one), weights(three))
    inodes = {(stage / "flextron/model.safetensors").stat().st_ino for stage in (one, two, three)}
    assert len(inodes) == 1
    assert checkpoint.verify(three / "flextron")
    history = checkpoint.read(three / "flextron").history
    assert [row["stage"] for row in history] == ["ElasticTraining", "SurrogateTraining", "StaticRouterTraining"]


def test_the_later_stages_add_a_dynamic_router_and_tune_the_network(piped):
    folder, _ = piped
    static, dynamic, joint = (folder / name for name in ("static_router", "dynamic_router", "joint_tuning"))
    assert equal(weights(static), weights(dynamic))
    assert not equal(weights(dynamic), weights(joint))
    space = checkpoint.read(joint / "flextron").space
    (router,), (later,) = (TrainedDynamicRouter.read_all(each / "flextron", space) for each in (dynamic, joint))
    assert router.stale is None
    # both were tuned with the network
    assert later.stale is None
    tuned = TrainedRouter.read_all(joint / "flextron", space)
    assert all(router.ladder.measured and not router.stale for router in tuned)
    assert (dynamic / "compute.html").stat().st_size > 1000
    assert [row["stage"] for row in checkpoint.read(joint / "flextron").history[-2:]] == [
        "DynamicRouterTraining",
        "JointTuning",
    ]


def test_select_looks_up_what_the_router_was_trained_for(routed, loaded):
    found = answer(routed, "flops<=0.5")
    assert found["how"] == "a look-up in the ladder of the router for flops"
    assert found["costs"]["flops"]["ratio"] <= 0.5
    assert found["loss"] is None
    rung = TrainedRouter.read_all(routed / "flextron", loaded.backbone.space)[0].ladder.at(
        0.5 * found["costs"]["flops"]["cost"] / found["costs"]["flops"]["ratio"]
    )
    assert (rung.loss, rung.sub_network.to_json()) == (found["predicted_loss"], found["sub_network"])


def test_select_searches_by_the_surrogate_where_no_router_was_trained(routed, loaded):
    found = answer(routed, "flops<=0.5,kv_bytes<=0.4")
    assert found["how"] == "a search by the surrogate, since a router knows one limit, not several"
    assert found["costs"]["flops"]["ratio"] <= 0.5
    assert found["costs"]["kv_bytes"]["ratio"] <= 0.4
    # what it says is what the surrogate says of what it found
    space = loaded.backbone.space
    surrogate = loaded.routing().surrogate
    one_hot = space.one_hot(SubNetwork.from_json(found["sub_network"]))
    assert found["predicted_loss"] == pytest.approx(float(surrogate.to_nats(surrogate.predict(one_hot))), rel=1e-5)
    (routed.parent / "text.txt").write_text("Ada feeds the owl at the mill. " * 40)
    on_text = answer(routed, "flops<=0.5", "--text", routed.parent / "text.txt", "--tokens", 128)
    assert on_text["how"].startswith("a look-up")
    assert 0 < on_text["loss"] < 10
    assert "--count has no effect on a look-up" in fail(
        "select", "--checkpoint", routed, "--budget", "flops<=0.5", "--count", 5
    )
    assert answer(routed, "parameters<=0.5")["how"].endswith("since no router was trained for parameters")
    assert answer(routed, "flops<=0.5", "--search", "uniform", "--tokens", 128)["how"].startswith("uniform search")
    before = answer(routed.parent / "elastic", "0.5")
    assert before["how"].startswith("a search by the excess losses that conversion computed")
    assert before["predicted_loss"] is None
    assert before["costs"]["flops"]["ratio"] <= 0.5


def test_a_search_spends_a_limit_on_what_the_surrogate_wants_and_a_tighter_one_predicts_more_loss(loaded):
    space = loaded.backbone.space
    flops, cache = (COUNTED[name](loaded.backbone, Workload()) for name in ("flops", "kv_bytes"))
    kept = loaded.routing().surrogate
    # a surrogate to which the width of attention is all that matters
    network = copy.deepcopy(kept.network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        wants = torch.tensor([block.kind == "attention" for block in space.blocks])
        network.main.weight.copy_((-torch.arange(space.num_choices) * wants[:, None]).flatten()[None])
    routing = Routing(
        space, {"flops": flops, "kv_bytes": cache}, {}, dataclasses.replace(kept, network=network, target="loss")
    )
    narrow = space.smallest()
    wide = SubNetwork(
        tuple(
            len(block.widths) - 1 if block.kind == "attention" else choice
            for block, choice in zip(space.blocks, narrow.choices, strict=True)
        )
    )
    within = Limit(flops, flops.cost(wide), "a")
    loose = routing.answer([within, Limit(cache, cache.full, "b")])
    tight = routing.answer([within, Limit(cache, 0.4 * cache.full, "b")])
    assert loose.sub_network == wide
    assert cache.ratio(tight.sub_network) <= 0.4 < cache.ratio(wide)
    assert tight.loss > loose.loss


def test_limits_that_no_sub_network_meets_at_once_are_an_error(loaded):
    space = loaded.backbone.space
    rising = COUNTED["flops"](loaded.backbone, Workload())
    rows = [tuple(1.0 - i / len(row) for i in range(len(row))) for row in rising.blocks]
    falling = CostTable("idle", "units", 1.0, tuple(rows))
    routing = Routing(space, {"flops": rising, "idle": falling}, {}, loaded.routing().surrogate)
    found = routing.answer([Limit(rising, 0.8 * rising.full, "a"), Limit(falling, 0.8 * falling.full * 2, "b")])
    assert rising.ratio(found.sub_network) <= 0.8
    with pytest.raises(ValueError, match="meets all limits of the budget at once"):
        routing.answer([Limit(rising, rising.smallest, "a"), Limit(falling, falling.smallest, "b")])


def test_set_budget_switches_a_loaded_model(routed):
    model = FlextronModel.from_pretrained(routed)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        full = model(tokens).logits
        for budget in ("flops<=0.4", "kv_bytes<=0.5"):
            chosen = model.set_budget(budget)
            switched = model(tokens).logits
            with model.use(chosen.sub_network):
                assert torch.equal(model(tokens).logits, switched)
            assert not torch.equal(switched, full)
        assert model.set_budget(1.0).sub_network == model.backbone.space.full()
        assert torch.equal(model(tokens).logits, full)
        # a bare ratio is of what the router is for
        assert model.set_budget(0.4) == model.set_budget("flops<=0.4")
        model.set_budget(1.0)
    with pytest.raises(ValueError, match="the smallest flops possible"):
        model.set_budget(0.001)
    early = FlextronModel.from_pretrained(routed.parent / "elastic").set_budget("parameters<=0.5")
    assert early.how.startswith("a search by the excess losses")
    assert early.loss is None


def test_a_router_of_another_cost_table_is_not_used(loaded):
    space = loaded.backbone.space
    other = COUNTED["flops"](loaded.backbone, Workload())
    other = CostTable(other.name, other.unit, other.fixed + 1, other.blocks)
    routing = Routing.read(loaded.folder, space, {"flops": other})
    found = routing.answer(routing.parse("flops<=0.5"))
    assert found.how.endswith("`python main.py reroute` trains one for this")
    assert other.ratio(found.sub_network) <= 0.5
    own = Routing.read(loaded.folder, space, loaded.routing().tables)
    assert own.answer(own.parse("flops<=0.5")).how.startswith("a look-up")


def test_reroute_trains_for_another_cost_without_the_network(routed, tmp_path):
    folder = tmp_path / "flextron"
    checkpoint.extend(routed / "flextron", folder, files={})
    # without its weights nothing could be measured; only their headers are looked at
    printed = succeed("reroute", "--checkpoint", folder, "--cost", "parameters", "--steps", 100)
    assert "the router for parameters" in printed
    assert checkpoint.verify(folder)
    assert answer(folder, "parameters<=0.5")["how"] == "a look-up in the ladder of the router for parameters"
    assert answer(folder, "flops<=0.5") == answer(routed, "flops<=0.5")
    assert "--fresh trains another" in fail("reroute", "--checkpoint", folder, "--cost", "parameters")
    succeed("reroute", "--checkpoint", folder, "--cost", "parameters", "--steps", 50, "--fresh")
    assert "no cost 'latency'; there are parameters" in fail("reroute", "--checkpoint", folder)
    assert "holds no surrogate" in fail("reroute", "--checkpoint", routed.parent / "elastic", "--cost", "parameters")


def test_validate_uses_the_router_of_the_run(routed):
    config = routed / "config.yaml"
    succeed("validate", "-c", config, "--run_folder", routed)
    trained = [row for row in table(routed) if row["step"] == 200]
    validated = json.loads((routed / "validate.json").read_text())
    assert [{**row, "step": 0} for row in trained] == [{**row, "step": 0} for row in validated]
    assert any(row["sub_network"] == "routed0.70" for row in validated)


def test_the_surrogate_stage_validates_and_predicts(piped):
    folder = piped[0] / "surrogate"
    config = ("-c", folder / "config.yaml", "--run_folder", folder)
    assert "val/surrogate/rank_correlation" in succeed("validate", *config)
    succeed("predict", *config)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    space = checkpoint.read(folder / "flextron").space
    kept = TrainedSurrogate.read(folder / "flextron", space)
    checked = kept.pairs.select(held_out=True)
    assert [row["sub_network"] for row in rows] == checked.choices.tolist()
    assert [row["loss"] for row in rows] == pytest.approx(checked.losses.tolist())
    predicted = kept.to_nats(kept.predict(checked.one_hot(space)))
    assert [row["predicted"] for row in rows] == pytest.approx(predicted.tolist(), abs=1e-4)
    assert len(rows) == 40


def test_damage_is_one_clear_line(routed, tmp_path):
    folder = tmp_path / "flextron"
    checkpoint.extend(routed / "flextron", folder, files={})
    space = checkpoint.read(folder).space
    path = next(folder.glob("routers/*.json"))
    about = json.loads(path.read_text())
    about["table"]["fixed"] += 1
    path.unlink()
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match="not the one that it was trained on"):
        TrainedRouter.read(path, space)
    (folder / "elastic/surrogate.safetensors").unlink()
    (folder / "elastic/surrogate.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"surrogate.safetensors is damaged"):
        TrainedSurrogate.read(folder, space)
    assert "is damaged" in fail("select", "--checkpoint", folder, "--budget", "0.5")
    # the other checkpoints share no file that was touched
    assert checkpoint.verify(routed / "flextron")


def test_what_is_stored_comes_back(loaded):
    space = loaded.backbone.space
    surrogate = loaded.routing().surrogate
    one_hot = torch.stack([space.one_hot(SubNetwork((0, 1, 2, 3, 1, 0))), space.one_hot(space.full())])
    folder = loaded.folder.parent / "again"
    (folder / "elastic").mkdir(parents=True, exist_ok=True)
    (folder / "elastic/surrogate.safetensors").write_bytes(surrogate.to_bytes())
    again = TrainedSurrogate.read(folder, space)
    assert torch.equal(again.predict(one_hot), surrogate.predict(one_hot))
    assert {k: v for k, v in dataclasses.asdict(again).items() if k in ("target", "full_loss", "settings")} == {
        k: v for k, v in dataclasses.asdict(surrogate).items() if k in ("target", "full_loss", "settings")
    }
    assert all(torch.equal(again.text[name], tensor) for name, tensor in surrogate.text.items())


@pytest.mark.parametrize(
    ("stage", "moment", "step", "signal_name"),
    [
        ("surrogate", "train_batch_end", 100, "SIGKILL"),
        ("surrogate", "validation_batch_start", 60, "SIGTERM"),
        ("static_router", "train_batch_end", 93, "SIGKILL"),
        ("static_router", "train_batch_end", 130, "SIGTERM"),
        ("static_router", "fit_end", 200, "SIGKILL"),
    ],
)
def test_a_killed_stage_ends_like_an_undisturbed_one(piped, tmp_path, stage, moment, step, signal_name):
    reference = piped[0] / stage
    folder, marker = tmp_path / "run", tmp_path / "marker"
    kill = {"marker": str(marker), "moment": moment, "step": step, "signal_name": signal_name}
    callback = json.dumps({"class_path": "tests.kills.KillOnce", "init_args": kill})
    command = ("fit", "-c", reference / "config.yaml", "--run_folder", folder, "--trainer.callbacks+", callback)
    killed = run(*command)
    assert killed.returncode == (-signal.SIGKILL if signal_name == "SIGKILL" else 143), killed.stdout + killed.stderr
    succeed(*command)
    for name in (
        "elastic/surrogate.safetensors",
        *(p.relative_to(reference / "flextron") for p in reference.glob("flextron/routers/*")),
    ):
        assert (folder / "flextron" / name).read_bytes() == (reference / "flextron" / name).read_bytes(), name
    assert logged(folder) == logged(reference)


# test_ranks_together.py has two processes of every stage
@pytest.mark.slow
def test_two_ranks_share_the_measuring_and_end_like_one(piped, tmp_path):
    reference = piped[0] / "static_router"
    steps = ("--trainer.max_steps", 60, "--trainer.val_check_interval", 60)
    config = ("fit", "-c", reference / "config.yaml", *steps)
    ranks = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
    # a cache of its own, or nothing would be measured
    cache = {"FLEXTRON_CACHE": str(tmp_path / "cache")}
    succeed(*config, "--run_folder", tmp_path / "one")
    done = in_own_process(*config, *ranks, "--run_folder", tmp_path / "two", **cache)
    assert done.returncode == 0, done.stdout + done.stderr
    space = checkpoint.read(reference / "flextron").space
    one, two = (TrainedSurrogate.read(tmp_path / name / "flextron", space).pairs for name in ("one", "two"))
    assert torch.equal(one.choices, two.choices)
    # a loss is measured by one rank as by the other, and the mean of two equal gradients is either: nothing is rounded
    assert torch.equal(one.losses, two.losses)
    assert len(one) > len(TrainedSurrogate.read(piped[0] / "surrogate/flextron", space).pairs)
    runs = [tmp_path / "one", tmp_path / "two", reference]
    routers = [TrainedRouter.read_all(run / "flextron", space)[0].network.state_dict() for run in runs]
    assert all(torch.equal(routers[0][name], routers[1][name]) for name in routers[0])
    surrogates = [TrainedSurrogate.read(run / "flextron", space).network.state_dict() for run in runs]
    assert all(torch.equal(surrogates[0][name], surrogates[1][name]) for name in surrogates[0])
    # which learned on for 200 steps
    assert not torch.equal(surrogates[0]["main.weight"], surrogates[2]["main.weight"])
