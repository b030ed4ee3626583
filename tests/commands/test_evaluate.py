"""`python main.py evaluate`: once as a user runs it, then in process, which is faster."""

import csv
import json
import sys

import pytest

from flextron_lit import FlextronModel, checkpoint
from flextron_lit.checkpoint.description import describe
from flextron_lit.checkpoint.location import Location, locate
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.commands import evaluate as evaluating
from flextron_lit.commands.evaluate import check, command, parser
from flextron_lit.commands.info import tables
from flextron_lit.evaluation import loss_rows as measured
from flextron_lit.evaluation.bootstrap_intervals import interval
from flextron_lit.evaluation.document_losses import document_losses
from flextron_lit.evaluation.networks import WAYS
from flextron_lit.evaluation.results import default_output
from flextron_lit.losses.cross_entropy import mean_cross_entropy
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.routers.search import uniform_pairs
from flextron_lit.routers.staleness import stale_files
from flextron_lit.space import SubNetwork
from tests.front_door import run
from tests.served import dynamic_router, write

DATA = {
    "domains": {"stories": {"source": "generated:40"}, "reports": {"source": "generated:40,1"}},
    "block_size": 64,
    "held_out": 0.4,
    "seed": 0,
}
HISTORY = [{"stage": "ElasticTraining", "steps": 1, "source": "x", "data": DATA}]
TEXTS = ("stories", "reports", measured.ALL)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEXTRON_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "run" / "flextron", history=HISTORY)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "owl.txt"
    path.write_text("Ada feeds the owl at the mill. " * 60)
    return path


@pytest.fixture
def evaluate(folder, capsys):
    """What a command line answers in JSON, by network, budget and text."""

    def called(*options, checkpoint=folder):
        command(["--checkpoint", str(checkpoint), "--json", "--no_report", *map(str, options)])
        found = json.loads(capsys.readouterr().out)
        return {(row["network"], row["budget"], row["text"]): row for row in found["losses"]}

    return called


@pytest.fixture
def forwards(monkeypatch):
    """Names of what was measured."""
    names = []
    stock = measured.document_losses

    def noted(backbone, selection, batches, name):
        names.append(name)
        return stock(backbone, selection, batches, name)

    monkeypatch.setattr(measured, "document_losses", noted)
    return names


# --- losses -----------------------------------------------------------------------------------------------------


def test_people_see_a_table_a_text(folder, text, tmp_path):
    options = ("--budgets", "0.8", "--text", text, "--tokens", 512, "--output", tmp_path / "out")
    done = run("evaluate", "--checkpoint", folder.parent / "flextron", *options)
    assert done.returncode == 0, done.stderr
    for words in ("owl.txt: 1 document, 511 tokens", "static 0.8", "0.711 parameters", "over static", "perplexity"):
        assert words in done.stdout
    assert "…" not in done.stdout
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    made = content["losses"]["made"]
    assert made["command"].startswith("python main.py evaluate --checkpoint ")
    assert made["checkpoint"] == content["checkpoint"] == checkpoint.digest(folder)
    assert (made["seed"], made["dtype"], made["device"]["type"]) == (0, "float32", "cpu")
    assert "torch" in made["versions"]


def test_every_budget_is_answered_in_every_way(evaluate, folder):
    rows = evaluate("--budgets", "1.0", "0.9", "0.8", "--tokens", 256)
    expected = [("full", None), *((way, budget) for budget in ("0.9", "0.8") for way in WAYS)]
    assert list(rows) == [(*network, text) for network in expected for text in TEXTS]
    model = FlextronModel.from_pretrained(folder)
    routing = model.flextron.routing()
    for budget in ("0.9", "0.8"):
        answer = model.flextron.answer(budget).sub_network
        row = rows["static", budget, measured.ALL]
        assert row["sub_network"] == answer.to_json()
        assert row["costs"] == {"parameters": routing.tables["parameters"].ratio(answer)}
        assert rows["uniform", budget, measured.ALL]["costs"]["parameters"] <= float(budget)
    # what tokens take depends on the text
    costs = [rows["dynamic", "0.9", text]["costs"]["flops"] for text in TEXTS]
    assert len(set(costs)) == 3
    assert min(costs) < costs[-1] < max(costs)


def test_losses_and_differences_are_those_of_the_networks(evaluate, folder, text):
    rows = evaluate("--budgets", "0.8", "--text", text, "--tokens", 1024)
    model = FlextronModel.from_pretrained(folder)
    batches = evaluating.texts_of(model.flextron, [text], 1024)["owl.txt"]
    loss = MeasuredLoss(model.backbone, batches)
    full, static, dynamic, uniform = (rows[key] for key in rows)
    assert full["loss"] == pytest.approx(loss(model.backbone.space.full()), rel=1e-5)
    assert static["loss"] == pytest.approx(loss(model.flextron.answer("0.8").sub_network), rel=1e-5)
    with model.use(model.flextron.dynamic_routing.answer("0.8", model.backbone)):
        logits = [model(block["input_ids"], use_cache=False).logits for block in batches]
    found = [
        mean_cross_entropy(each.detach(), block["labels"]).item() for each, block in zip(logits, batches, strict=True)
    ]
    assert dynamic["loss"] == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert full["over_full"] is full["over_static"] is static["over_static"] is None
    for row, over, other in (
        (static, "over_full", full),
        (dynamic, "over_static", static),
        (uniform, "over_full", full),
    ):
        assert row[over]["difference"] == pytest.approx(row["loss"] - other["loss"], abs=1e-9)
    # an interval is that of the documents' losses, and so lies between the least and the largest of them
    selections = {
        "full": model.backbone.space.full(),
        "static": model.flextron.answer("0.8").sub_network,
        "dynamic": model.flextron.dynamic_routing.answer("0.8", model.backbone),
        "uniform": SubNetwork.from_json(uniform["sub_network"]),
    }
    by_document = {
        name: document_losses(model.backbone, selection, batches, name) for name, selection in selections.items()
    }
    for losses, said in (
        (by_document["full"], full["interval"]),
        (by_document["static"] - by_document["full"], static["over_full"]["interval"]),
        (by_document["dynamic"] - by_document["static"], dynamic["over_static"]["interval"]),
        (by_document["uniform"] - by_document["full"], uniform["over_full"]["interval"]),
    ):
        assert said == pytest.approx(interval(losses, seed=0), rel=1e-5, abs=1e-6)
        means = losses.total / losses.tokens
        assert means.min() - 1e-6 <= said[0] < said[1] <= means.max() + 1e-6


def test_the_uniform_one_is_the_best_that_meets_the_budget(evaluate, folder, text):
    options = ("--budgets", "parameters=0.9", "--networks", "uniform", "--text", text, "--tokens", 512)
    best = evaluate(*options)["uniform", "parameters=0.9", "owl.txt"]
    model = FlextronModel.from_pretrained(folder)
    space, loss = (
        model.backbone.space,
        MeasuredLoss(model.backbone, evaluating.texts_of(model.flextron, [text], 512)["owl.txt"]),
    )
    (limit,) = model.flextron.routing().parse("parameters=0.9")
    fitting = [sub for _, sub in uniform_pairs(space) if limit.allows(sub)]
    # of several that differ, one that no other contains
    assert best["sub_network"] in [sub.to_json() for sub in fitting]
    wide = [space.uniform(mlp=0.5), space.uniform(attention=0.5)]
    assert all(limit.allows(sub) for sub in wide)
    assert best["loss"] <= min(loss(sub) for sub in wide) + 1e-5
    assert loss(wide[0]) != pytest.approx(loss(wide[1]), rel=1e-4)


def test_the_csv_says_the_same(evaluate, folder):
    rows = evaluate("--budgets", "0.8", "--tokens", 128)
    with (folder.parent / "flextron-evaluation" / "evaluation.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [(row["network"], row["budget"] or None, row["text"]) for row in written] == list(rows)
    for row, other in zip(written, rows.values(), strict=True):
        assert float(row["loss"]) == other["loss"]
        assert [row["loss_low"], row["loss_high"]] == [str(bound) for bound in other["interval"]]


def test_the_same_command_measures_nothing_again(evaluate, forwards):
    options = ("--budgets", "0.8", "--tokens", 128)
    first = evaluate(*options)
    measured_before = len(forwards)
    assert evaluate(*options) == first
    assert len(forwards) == measured_before
    for changed in (("--budgets", "0.8", "--tokens", 64), (*options, "--dtype", "bfloat16"), (*options, "--fresh")):
        evaluate(*changed)
        assert len(forwards) > measured_before
        measured_before = len(forwards)


def test_the_seed_moves_intervals_alone(evaluate):
    one, other = (evaluate("--tokens", 2048, "--seed", seed)["full", None, "stories"] for seed in (1, 2))
    assert one["loss"] == other["loss"]
    assert one["interval"] != other["interval"]


def test_by_default_there_is_as_much_text_as_the_smallest_domain_has(folder, tmp_path):
    data = {**DATA, "domains": {**DATA["domains"], "small": {"source": "generated:40,2", "tokens": {"test": 200}}}}
    small = write(tmp_path / "small", history=[{**HISTORY[0], "data": data}])
    loaded = FlextronModel.from_pretrained(small).flextron
    assert [len(batches) for batches in evaluating.texts_of(loaded, [], None).values()] == [3, 3, 3]


# --- what is kept -----------------------------------------------------------------------------------------------


def test_the_checkpoint_knows_and_stays_whole(evaluate, folder, tmp_path):
    before, time = checkpoint.digest(folder), (folder / checkpoint.RECORD).stat().st_mtime_ns
    rows = evaluate("--budgets", "0.8", "--tokens", 128)
    evaluate("--budgets", "0.8", "--tokens", 128, "--output", tmp_path / "other")
    noted = checkpoint.evaluations(folder)
    assert [each["file"] for each in noted] == [
        str(folder.parent / "flextron-evaluation" / "evaluation.json"),
        str(tmp_path / "other" / "evaluation.json"),
    ]
    values = {(r["network"], r["budget"], r["text"]): r["value"] for r in noted[0]["results"]}
    assert values == {key: row["loss"] for key, row in rows.items()}
    assert checkpoint.verify(folder)
    assert checkpoint.read(folder).history == HISTORY
    assert (checkpoint.digest(folder), (folder / checkpoint.RECORD).stat().st_mtime_ns) == (before, time)
    columns = [list(column.cells) for column in next(tables(describe(Location(folder, None)))).columns]
    assert (
        f"loss of stories: full {values['full', None, 'stories']:.3f}, static 0.8"
        in dict(zip(*columns, strict=True))["evaluations"]
    )


def test_what_was_noted_is_no_part_of_the_next_checkpoint(evaluate, folder, tmp_path):
    evaluate("--tokens", 128)
    checkpoint.extend(folder, tmp_path / "next", files={})
    assert checkpoint.evaluations(tmp_path / "next") == []
    assert checkpoint.verify(tmp_path / "next")


def test_a_note_that_was_changed_is_noticed(evaluate, folder):
    evaluate("--tokens", 128)
    path = folder / checkpoint.RECORD
    path.write_text(path.read_text().replace('"metric": "loss"', '"metric": "gain"', 1))
    with pytest.raises(ValueError, match="is damaged: its sha256 is"):
        checkpoint.verify(folder)


def test_a_checkpoint_can_be_left_alone(evaluate, folder):
    before = (folder / checkpoint.RECORD).read_bytes()
    evaluate("--tokens", 128, "--leave_checkpoint")
    assert (folder / checkpoint.RECORD).read_bytes() == before


def test_results_lie_in_the_run_folder_or_beside_the_checkpoint(folder):
    assert default_output(locate(folder)) == folder.with_name("flextron-evaluation")
    (folder.parent / "status.json").write_text('{"finished": true}')
    assert default_output(locate(folder)) == folder.parent
    assert default_output(locate(folder.parent)) == folder.parent
    assert default_output(Location(folder.parent / "else", None)) == folder.parent / "else-evaluation"
    assert RunFolder(folder.parent).status == "finished"


# --- mistakes ---------------------------------------------------------------------------------------------------


# budgets before texts: the default asks for more text than there is
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budgets", "parameters=0.001", "--networks", "uniform"), "the smallest parameters possible is"),
        (("--budgets", "0.001", "--networks", "static"), "the smallest .* possible is .*; --networks says which kinds"),
        (("--budgets", "0.6"), "meets budgets of 0.750 and more, not 0.6.*; --networks says which kinds"),
        (("--budgets", "quickly"), "cannot read the budget 'quickly'"),
        (("--budgets", "0.8", "0.8"), "--budgets names 0.8 twice"),
        (("--networks", "static"), "--networks has no effect without --budgets"),
        (("--latency", "mine"), "--latency has no effect without --budgets"),
        (("--budgets", "0.8", "--latency", "mine"), "no latency table 'mine'"),
        (("--limit", "5"), "--limit has no effect without --tasks"),
        (("--only_tasks",), "--only_tasks has no effect without --tasks"),
        (("--tokens", "0"), "--tokens must be 1 or more, not 0"),
        (("--tokens", "100000"), "test_tokens 100000 makes .*: choose between 64 and"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--device", "abacus"), "cannot use the device 'abacus'"),
    ],
)
def test_a_mistake_is_one_clear_line(evaluate, folder, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(*options)
    assert not folder.with_name("flextron-evaluation").exists()


def test_two_texts_of_one_name_are_refused(evaluate, text, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / text.name).write_text(text.read_text())
    with pytest.raises(ValueError, match=r"two texts are called owl.txt"):
        evaluate("--text", text, tmp_path / "other" / text.name, "--tokens", 128)


def test_without_routers_budgets_go_to_uniform_ones_if_one_says_so(evaluate, tmp_path):
    bare = write(tmp_path / "bare", history=HISTORY, routers=())
    options = ("--budgets", "parameters=0.8", "--tokens", 128)
    with pytest.raises(ValueError, match="nothing to answer budgets with.* --networks uniform"):
        evaluate(*options, checkpoint=bare)
    assert ("uniform", "parameters=0.8", "stories") in evaluate(*options, "--networks", "uniform", checkpoint=bare)
    with pytest.raises(ValueError, match="has no dynamic router; what can answer budgets there: uniform"):
        evaluate(*options, "--networks", "dynamic", checkpoint=bare)


def test_a_checkpoint_of_unknown_text_needs_one(evaluate, text, tmp_path):
    silent = write(tmp_path / "silent")
    with pytest.raises(ValueError, match="does not say what it was trained on; name a text with --text"):
        evaluate(checkpoint=silent)
    assert ("full", None, "owl.txt") in evaluate("--text", text, "--tokens", 512, checkpoint=silent)


def test_a_stale_router_is_noted(folder, tmp_path, capsys, caplog):
    alone = write(tmp_path / "alone", history=HISTORY, routers=(dynamic_router,))
    space = checkpoint.read(alone).space
    checkpoint.extend(alone, alone, files=stale_files(alone, space, "JointTuning"))
    command(["--checkpoint", str(alone), "--budgets", "0.8", "--networks", "dynamic", "--tokens", "128"])
    assert "note: the dynamic router for flops is stale: JointTuning has changed the network since" in caplog.text


def test_without_the_harness_one_line_says_what_to_install(monkeypatch):
    options = parser().parse_args(["--checkpoint", "x", "--tasks", "offline_piqa"])
    monkeypatch.setattr(evaluating, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--tasks needs the LM evaluation harness: pip install -r requirements-eval"):
        check(options)


def test_losses_need_no_harness(evaluate, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate("--tokens", 128)
