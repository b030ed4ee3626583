"""The report of a run: what the page says, made from run folders that nothing was trained for."""

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic, shape_of
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.commands import evaluate as evaluating
from flextron_lit.commands import report as reporting
from flextron_lit.costs import COUNTED, Workload
from flextron_lit.evaluation import loss_rows as measured
from flextron_lit.evaluation.results import HTML, JSON
from flextron_lit.model import FlextronModel
from flextron_lit.report import assembly, findings, generated_texts, origin, page_data, point_costs
from flextron_lit.report import reported_folder as source
from flextron_lit.report.points import POINT_KINDS, validated
from flextron_lit.routers.staleness import stale_files
from flextron_lit.stages.validation import ValidationSet, mean_widths
from tests import served
from tests.front_door import succeed

PROMPT = "Ada feeds <b>the owl</b></script>"
DOMAINS = {"stories": 0.0, "re<ports": 0.5}
MOST_BYTES = 6_000_000
KNOWN = ("step", "domain", "sub_network", "loss", "perplexity", "mlp_width", "attention_width")


class Page(HTMLParser):
    """Of a page: what is fetched, its data, its text without scripts, labels of inputs, tags."""

    def __init__(self, html):
        super().__init__()
        self.addresses, self.tags, self.inputs, self.labels, self.scripts = [], [], [], [], []
        self.text, self.frames, self._inside = "", [], None
        self.feed(html)
        self.close()
        self.data = json.loads(self.scripts[0])
        self.measures = {each["name"]: each for each in self.data["measures"]}

    def points(self, measure="loss, validation"):
        """Of one measure, by name."""
        return {point["name"]: point for point in self.measures[measure]["points"]}

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        self._inside = tag
        if tag == "script":
            self.scripts.append("")
        if tag == "input":
            self.inputs.append(attributes)
        if tag == "label":
            self.labels.append(attributes.get("for"))
        if tag == "iframe":
            self.frames.append(attributes["srcdoc"])

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data


def rows(answers, column, step=9):
    """A validation table: what a name costs and how wide it is, its losses by domain."""
    return [
        {
            "step": step,
            "sub_network": name,
            "domain": domain,
            "loss": loss + more,
            "perplexity": 1.0,
            column: cost,
            "mlp_width": widths["mlp"],
            "attention_width": widths["attention"],
        }
        for name, (cost, widths, loss) in answers.items()
        for domain, more in DOMAINS.items()
    ]


READ = {"domains": {"stories": {"source": "generated:1", "weight": 1.0}}, "block_size": 64}


def write_run(folder, stage, table=(), validation=False, routers=(), behind=(), data=READ):
    """A finished run folder; returns the history of its checkpoint."""
    record = {"stage": stage, "steps": 9, "tokens": 512, "seed": 7, "source": "x", "git_commit": "abcdef0123456789"}
    history = [*behind, {**record, "data": data}]
    run = RunFolder(folder)
    settings = {"checkpoint": "x", **({"validation": vars(ValidationSet(random_costs=[0.71]))} if validation else {})}
    folder.mkdir(parents=True)
    run.begin({"model": {"init_args": settings}}, fresh=False)
    served.write(run.checkpoint, history=history, routers=routers)
    if table:
        earlier = [{**row, "loss": 99.0, "step": 0} for row in table]
        (folder / "training.json").write_text(json.dumps([*earlier, *table]))
    run.finish()
    return history


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A pipeline of two stages: the elastic one, and one with both routers; and its sub-networks by name."""
    folder = tmp_path_factory.mktemp("pipeline") / "nightly"
    scratch = served.write(tmp_path_factory.mktemp("scratch") / "flextron", routers=())
    backbone = load_elastic(str(scratch)).backbone
    space = backbone.space
    parameters = COUNTED["parameters"](backbone, Workload())
    ladder = served.static_router(backbone).ladder
    watched = ValidationSet(random_costs=[0.71]).resolve(space, parameters)
    routed = {f"routed{b:.2f}": ladder.at(b * parameters.full).sub_network for b in (0.9, 0.6)}
    sub_networks = watched | routed

    def shares(name):
        return mean_widths(space, space.one_hot(sub_networks[name]))

    first = {n: (parameters.cost(s), shares(n), 4.0 if n == "random0.71" else 3.0) for n, s in watched.items()}
    history = write_run(folder / "b_elastic", "ElasticTraining", rows(first, "parameters"), True)
    half = 0.5 * served.dynamic_router(backbone).table.full
    dynamic = {"dynamic0.80": (half, {"mlp": 0.4, "attention": 0.3}, 2.2)}
    routers = (served.static_router, served.dynamic_router)
    full = {"full": (1.0, {"mlp": 1.0, "attention": 1.0}, 2.0)}
    static = {n: (1.0, shares(n), 2.5) for n in routed}
    table = rows({**full, **static, **dynamic}, "parameters")
    write_run(folder / "a_routers", "StaticRouterTraining", table, routers=routers, behind=history)
    (folder / "a_routers" / "compute.html").write_text('<!DOCTYPE html><p title="x">shaded</p>')
    summary = [
        {"name": n, "budget": b, "router": r, "losses": dict(DOMAINS), "latency_ms": 12.0}
        for n, b, r in (("full", 1.0, ""), ("routed0.90", 0.9, "static"), ("routed0.60", 0.6, "static"))
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder, sub_networks


@pytest.fixture(scope="module")
def html(run):
    folder, _ = run
    written = reporting.write_report(source.find(folder), prompt=PROMPT)
    assert written == folder / "report.html"
    return written.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_it_is_one_file_that_fetches_nothing(html, page):
    assert 500_000 < len(html.encode()) < MOST_BYTES
    assert page.addresses == []
    assert not {"link", "img", "base", "object", "embed"} & set(page.tags)
    # Vega has url( in what it can read from files; our own style has none
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in html


def test_a_text_cannot_end_the_script_that_holds_it(run, html, page):
    # the prompt ends a script, and a domain begins a tag: both are shown, and neither is markup
    assert len(page.scripts) == 3
    assert html.count("</script>") == 3
    assert PROMPT in page.text
    assert "<b>the" not in html
    assert set(page.points()["full"]["losses"]) == set(DOMAINS)
    assert "</script>" not in page_data.embedded({"x": "</script>"})
    assert json.loads(page_data.embedded({"x": ["</script>", float("nan"), (1.5,)]})) == {
        "x": ["</script>", None, [1.5]]
    }


def test_its_data_are_those_of_the_summary_and_every_budget_is_there(run, page):
    folder, _ = run
    assert page.data["summary"] == json.loads((folder / "summary.json").read_text())
    assert {row["name"] for row in page.data["summary"]} < set(page.points())
    for name in ("full", "routed0.90", "routed0.60", "dynamic0.80", "mlp25", "random0.71"):
        assert name in page.text
    # measured latencies stand in the table
    assert page.text.count("12 ms") == len(page.data["summary"])


def test_points_have_the_losses_of_the_last_stage_that_watched_them(page):
    found = page.points()
    assert found["full"]["losses"] == {domain: 2.0 + more for domain, more in DOMAINS.items()}
    assert found["mlp25"]["losses"] == {domain: 3.0 + more for domain, more in DOMAINS.items()}
    assert found["mlp25"]["value"] == 3.25
    assert (found["full"]["source"], found["mlp25"]["source"]) == ("a_routers", "b_elastic")
    kinds = {name: point["kind"] for name, point in found.items()}
    assert [kinds[n] for n in ("full", "routed0.60", "dynamic0.80", "mlp25", "random0.71")] == list(POINT_KINDS)
    assert found["routed0.60"]["budget"] == 0.6
    assert found["mlp25"]["budget"] is None


@pytest.mark.parametrize("name", ["full", "mlp25", "random0.71", "routed0.90"])
def test_a_point_has_every_cost_of_its_sub_network(run, page, name):
    folder, sub_networks = run
    checkpoint_folder = folder / "a_routers/flextron"
    backbone = shape_of(checkpoint_folder, checkpoint.read(checkpoint_folder).space)
    point = page.points()[name]
    expected = {
        n: COUNTED[n](backbone, Workload()).cost(sub_networks[name]) for n in ("parameters", "flops", "kv_bytes")
    }
    assert point["costs"] == expected
    # negative control: another one's are others
    assert point["costs"] != {n: COUNTED[n](backbone, Workload()).cost(sub_networks["attention50"]) for n in expected}


def test_a_dynamic_router_has_its_own_cost_alone(page):
    full = page.points()["full"]
    assert page.points()["dynamic0.80"]["costs"] == {"flops": pytest.approx(0.5 * full["costs"]["flops"])}


def test_the_ladder_has_every_rung_with_costs_and_choices(run, page):
    _, sub_networks = run
    ladder = page.data["ladder"]
    assert ladder["cost"] == "parameters"
    assert [rung["loss"] for rung in ladder["rungs"]] == [4.0, 3.0, 2.5, 2.0]
    assert ladder["rungs"][-1]["choices"] == sub_networks["full"].to_json()
    assert ladder["rungs"][-1]["ratios"] == {"parameters": 1.0, "flops": 1.0, "kv_bytes": 1.0}
    assert len(ladder["rungs"][0]["choices"]) == len(page.data["blocks"])
    (slider,) = [each for each in page.inputs if each["type"] == "range"]
    assert (slider["min"], slider["max"]) == ("0", "3")
    assert slider["id"] in page.labels
    axes = [each["value"] for each in page.inputs if each["type"] == "radio"]
    assert axes == list(page.data["charts"]["trade_off"]) == ["parameters", "flops", "kv_bytes"]


def test_texts_are_those_that_the_network_generates(run, page):
    folder, _ = run
    model = FlextronModel.from_pretrained(folder / "a_routers")
    inputs = model.tokenizer(PROMPT, return_tensors="pt")
    for budget in (1.0, 0.8):
        made = model.generate(**inputs, budget=budget, max_new_tokens=generated_texts.NEW_TOKENS, do_sample=False)
        expected = model.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert expected in page.text
    # the dynamic router counts FLOPs, the static one parameters
    assert len(re.findall(r"0\.\d{3} of the full network's flops", page.text)) == 1
    assert len(re.findall(r"0\.\d{3} of the full network's parameters", page.text)) == 2
    for title in ("static router, budget 0.8", "static router, budget 0.6", "dynamic router, budget 0.8"):
        assert title in page.text
    # the dynamic router does not go as low, and says so
    assert "the dynamic router meets budgets of 0.750 and more, not 0.6" in page.text


def test_the_page_of_a_dynamic_routers_compute_is_in_a_frame(page):
    assert page.frames == ['<!DOCTYPE html><p title="x">shaded</p>']


def test_it_says_where_the_network_comes_from(page):
    for said in ("ElasticTraining", "StaticRouterTraining", "abcdef0123", "generated:1", "b_elastic"):
        assert said in page.text
    assert [record["seed"] for record in page.data["history"]] == [7, 7]


def test_the_command_of_a_pipeline_is_kept_until_it_starts_afresh(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main.py", "pipeline", "-c", "my config.yaml"])
    origin.note_invocation(tmp_path, fresh=False)
    origin.note_invocation(tmp_path, fresh=False)
    (first, _) = origin.invocations(tmp_path)
    assert first["command"] == "python main.py pipeline -c 'my config.yaml'"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d[+-]\d\d:\d\d", first["date"])
    assert "cores" in first["machine"] or "NVIDIA" in first["machine"]
    origin.note_invocation(tmp_path, fresh=True)
    assert len(origin.invocations(tmp_path)) == 1
    assert origin.invocations(tmp_path / "nowhere") == []


def test_finished_stages_come_in_the_order_of_their_checkpoints(run, tmp_path):
    assert [stage.path.name for stage in source.find(run[0]).stages] == ["b_elastic", "a_routers"]
    (tmp_path / "summary.json").write_text("[]")
    begun = RunFolder(tmp_path / "c_begun")
    begun.path.mkdir()
    begun.begin({}, fresh=False)
    with pytest.raises(ValueError, match="no stage is finished"):
        source.find(tmp_path)
    (tmp_path / "b_elastic").symlink_to(run[0] / "b_elastic")
    assert [stage.path.name for stage in source.find(tmp_path).stages] == ["b_elastic"]


def test_what_stands_in_the_way_of_a_page_fails_no_pipeline(tmp_path, capsys):
    # nothing says what texts could go on from
    write_run(tmp_path / "only", "ElasticTraining", data=None)
    stages = [RunFolder(tmp_path / "only")]
    assembly.report_pipeline(tmp_path, stages)
    printed = capsys.readouterr().out
    assert "note: there is no report: the checkpoint does not say what it was trained on" in printed
    assert f"python main.py report {tmp_path}" in printed
    assert not (tmp_path / "report.html").exists()
    # one that is there stays, until there is another checkpoint
    (tmp_path / "report.html").write_text("kept")
    assembly.report_pipeline(tmp_path, stages)
    assert capsys.readouterr().out.startswith("the report is")
    os.utime(tmp_path / "report.html", (0, 0))
    assembly.report_pipeline(tmp_path, stages)
    assert "note: there is no report" in capsys.readouterr().out


def test_of_several_latency_tables_it_shows_the_routers_own(tmp_path):
    folder = tmp_path / "flextron"

    def for_latency(backbone):
        return replace(served.static_router(backbone), table=served.latency_table(backbone, 32).tables()["latency"])

    served.write(folder, routers=[for_latency])
    backbone = shape_of(folder, checkpoint.read(folder).space)
    names = [served.latency_table(backbone, tokens).write(folder).stem for tokens in (16, 32)]
    found = findings.gather(source.find(folder), backbone)
    assert list(found.tables) == ["latency", "parameters", "flops", "kv_bytes"]
    assert (found.measured.workload.prompt_tokens, found.notes) == (32, [])
    other = findings.gather(source.find(folder), backbone, names[0])
    assert other.measured.workload.prompt_tokens == 16
    assert other.notes == ["Not of the request above, but as the router was trained for: latency of a request."]
    # the axis stays that of the ladder
    assert other.tables["latency"] == found.tables["latency"]
    shutil.rmtree(folder / "routers")
    found = findings.gather(source.find(folder), backbone)
    assert found.measured.workload.prompt_tokens == 16
    assert found.notes == [f"Latencies are those of {names[0]}; --latency shows another one: {names[1]}."]


def test_all_milliseconds_of_the_page_are_of_one_measurement(tmp_path):
    folder = tmp_path / "nightly"
    scratch = served.write(tmp_path / "scratch/flextron", routers=())
    backbone = load_elastic(str(scratch)).backbone
    known = served.latency_table(backbone, 16)
    table = known.tables()["latency"]

    def dynamic(backbone):
        """Its own table is of a machine that was three times as slow."""
        slow = replace(table, fixed=3 * table.fixed, blocks=tuple(tuple(3 * c for c in row) for row in table.blocks))
        return replace(served.dynamic_router(backbone), table=replace(slow, reference=3 * table.full))

    answer = served.latency_router(backbone).ladder.at(0.9 * table.full).sub_network
    shares = mean_widths(backbone.space, backbone.space.one_hot(answer))
    answers = {
        "full": (table.full, {"mlp": 1.0, "attention": 1.0}, 2.0),
        "routed0.90": (table.cost(answer), shares, 2.5),
        "dynamic0.80": (0.8 * table.full, {"mlp": 0.4, "attention": 0.3}, 2.2),
    }
    validated_rows = [
        {**row, "cost_ratio": row["latency"] / table.full, "loss": row["loss"]} for row in rows(answers, "latency")
    ]
    write_run(folder / "a", "StaticRouterTraining", validated_rows, routers=(served.latency_router, dynamic))
    known.write(folder / "a/flextron")
    # measured at the end, when the machine took twice as long
    ratios = {"full": 1.0, "routed0.90": 0.95, "dynamic0.80": 0.85}
    over = {"cost": "latency", "budget_ratio": 0.95, "budget_spread": 0.01, "over_budget": 0.05}
    summary = [
        {"name": n, "budget": 0.9, "router": "static", "losses": DOMAINS, "latency_ms": 2 * table.full * ratio}
        | (over if n == "routed0.90" else {})
        for n, ratio in ratios.items()
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    written = reporting.write_report(source.find(folder), texts=False)
    page = Page(written.read_text(encoding="utf-8"))
    points = page.points()
    assert points["full"]["costs"]["latency"] == pytest.approx(table.full)
    assert points["routed0.90"]["costs"]["latency"] == pytest.approx(table.cost(answer))
    assert points["dynamic0.80"]["costs"] == {"latency": pytest.approx(0.8 * table.full)}
    for ratio in ratios.values():
        assert f"{table.short(ratio * table.full)} ({ratio:.3f})" in page.text
        assert f"{2 * table.full * ratio:.0f} ms" not in page.text
    assert "Missed: measured again, the static answer to 0.9 of the latency takes 0.950 ± 0.010" in page.text


def test_a_checkpoint_alone_has_a_ladder_and_no_points(run, tmp_path):
    named = run[0] / "a_routers/flextron"
    before = sorted(named.rglob("*"))
    printed = succeed("report", named, "--no_texts", "--output", tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "wrote" in printed
    assert (page.measures, len(page.data["ladder"]["rungs"])) == ({}, 4)
    assert "What it writes" not in page.text
    assert before == sorted(named.rglob("*"))
    assert source.find(named).page.parent.name == ""


def test_a_network_without_routers_has_points_and_no_slider(run, tmp_path):
    reporting.command([str(run[0] / "b_elastic"), "--no_texts", "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.data["ladder"] is None
    assert {point["kind"] for point in page.points().values()} == {"full", "uniform", "random"}
    assert [each for each in page.inputs if each["type"] == "range"] == []


def test_a_stale_router_is_not_shown_and_the_page_says_why(run, tmp_path):
    folder, _ = run
    named = folder / "a_routers/flextron"
    checkpoint.extend(named, tmp_path / "stale", files=stale_files(named, checkpoint.read(named).space, "Later"))
    reporting.command([str(tmp_path / "stale"), "--no_texts", "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.data["ladder"] is None
    assert "static router for parameters is stale: Later has changed the network" in page.text


def test_points_of_earlier_weights_are_faded(run, tmp_path):
    folder, _ = run
    stages = source.find(folder).stages
    assert [each.earlier for each in validated(stages)] == [False] * len(validated(stages))
    tuned = tmp_path / "tuned"
    history = checkpoint.read(stages[-1].checkpoint).history
    write_run(tuned, "JointTuning", behind=history)
    found = {each.name: each.earlier for each in validated([*stages, RunFolder(tuned)])}
    assert set(found.values()) == {True}


def test_a_checkpoint_in_a_folder_that_is_no_finished_run_has_a_page_without_points(run, tmp_path):
    shutil.copytree(run[0] / "a_routers/flextron", tmp_path / "copied/flextron")
    reporting.command([str(tmp_path / "copied"), "--no_texts", "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert (page.measures, len(page.data["ladder"]["rungs"])) == ({}, 4)


def test_names_of_a_stage_with_another_space_say_nothing(run, tmp_path):
    folder, sub_networks = run
    shutil.copytree(folder / "b_elastic", tmp_path / "narrower")
    record = tmp_path / "narrower/flextron" / checkpoint.RECORD
    content = json.loads(record.read_text())
    for block in content["space"]:
        block["widths"] = block["widths"][1:]
    record.write_text(json.dumps(content))
    space = checkpoint.read(folder / "b_elastic/flextron").space
    backbone = shape_of(folder / "b_elastic/flextron", space)
    stages = [RunFolder(tmp_path / "narrower"), RunFolder(folder / "a_routers")]
    assert set(point_costs.named(stages[:1], backbone)) == {"full"}
    assert point_costs.named(stages[1:], backbone)["mlp25"] == sub_networks["mlp25"]


def test_a_name_that_means_something_else_now_has_no_costs(run):
    folder, sub_networks = run
    stages = source.find(folder).stages
    found = [each for each in validated(stages) if each.name == "mlp25"]
    space = checkpoint.read(stages[0].checkpoint).space
    backbone = shape_of(stages[0].checkpoint, space)
    tables = {"parameters": COUNTED["parameters"](backbone, Workload())}
    right, wrong = sub_networks, {"mlp25": sub_networks["mlp50"]}
    (point,) = point_costs.priced(found, space, tables, right, None)
    assert point.costs == {"parameters": tables["parameters"].cost(sub_networks["mlp25"])}
    (point,) = point_costs.priced(found, space, tables, wrong, None)
    assert point.costs == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--no_texts", "--prompt", "x"), "--prompt has no effect with --no_texts"),
        (("--no_texts", "--output", "/dev/null/page.html"), "cannot write /dev/null/page.html"),
        (("--no_texts", "--latency", "other"), "there is no latency table 'other'"),
        ((), "is no Flextron checkpoint"),
    ],
)
def test_a_mistake_is_one_clear_line(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reporting.command([str(run[0] if options else tmp_path), *options])


# --- evaluations ------------------------------------------------------------------------------------------------


TEXTS = {"one.txt": "Ada feeds the owl at the mill. ", "two.txt": "The bell rings, and Otto mends the clock. "}
SCORES = {"owls": {"questions": 50, "acc": 0.25, "acc_stderr": 0.01, "f1,strict": 0.5, "f1_stderr,strict": 0.02}}


@pytest.fixture
def evaluated(run, tmp_path):
    """A checkpoint of its own, evaluated on two texts at a budget; its scores are as if the harness were there."""
    folder = tmp_path / "nightly"
    shutil.copytree(run[0] / "a_routers", folder)
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text * 60)
    options = ["--checkpoint", folder, "--budgets", "0.8", "--tokens", 256, "--text"]
    evaluating.command(list(map(str, [*options, *(tmp_path / name for name in TEXTS)])))
    content = json.loads((folder / JSON).read_text())
    full, static, dynamic, *_ = [row for row in content["losses"]["rows"] if row["text"] == measured.ALL]
    asked = [(full, 10, 0.9), (full, None, 0.25), (static, None, 0.125), (dynamic, None, 0.125)]
    content["tasks"] = [
        {
            **{name: row[name] for name in ("network", "budget", "how", "sub_network", "costs")},
            "task": "owls",
            "limit": limit,
            "scores": {"owls": {**SCORES["owls"], "acc": accuracy}},
            "made": content["losses"]["made"],
        }
        for row, limit, accuracy in asked
    ]
    (folder / JSON).write_text(json.dumps(content))
    return folder, content


def test_an_evaluation_has_a_page_with_its_losses_first(evaluated):
    folder, content = evaluated
    page = Page((folder / HTML).read_text(encoding="utf-8"))
    assert list(page.measures) == ["loss, evaluated", "loss, validation"]
    found = page.points("loss, evaluated")
    rows = {(row["network"], row["text"]): row for row in content["losses"]["rows"]}
    assert list(found) == ["full", "static 0.8", "dynamic 0.8", "uniform 0.8"]
    for name, point in found.items():
        row = rows[name.split()[0], measured.ALL]
        assert (point["value"], [point["low"], point["high"]]) == (row["loss"], row["interval"])
        assert point["losses"] == {text: rows[name.split()[0], text]["loss"] for text in TEXTS}
        assert (point["kind"], point["source"]) == (row["network"], "evaluate")
    # costs are those of the page's tables: of a dynamic router its own alone
    ratio = rows["static", measured.ALL]["costs"]["parameters"]
    costs = {name: point["costs"] for name, point in found.items()}
    assert costs["static 0.8"]["parameters"] == pytest.approx(ratio * costs["full"]["parameters"])
    assert list(costs["dynamic 0.8"]) == ["flops"]
    assert (found["dynamic 0.8"]["widths"], found["full"]["widths"]) == ("", "attention 100%, mlp 100%")
    # the same in the table, and where it comes from
    row = rows["static", measured.ALL]
    half = (row["interval"][1] - row["interval"][0]) / 2
    assert f"{row['loss']:.3f} ±{half:.3f}" in page.text
    assert content["losses"]["made"]["command"] in page.text
    # what it writes goes on from what it was evaluated on
    assert "What it writes" in page.text
    assert "Ada feeds the owl" in page.text


def test_a_report_has_the_evaluations_of_its_checkpoint(evaluated, tmp_path):
    folder, _ = evaluated
    output = tmp_path / "page.html"
    reporting.command([str(folder), "--no_texts", "--output", str(output)])
    page = Page(output.read_text(encoding="utf-8"))
    scores = [f"{metric} of owls{asked}" for asked in (", 10 questions", "") for metric in ("acc", "f1,strict")]
    assert list(page.measures) == ["loss, validation", "loss, evaluated", *scores]
    accuracy = page.points("acc of owls")
    # what was asked with fewer questions is not shown beside the others
    assert [point["value"] for point in page.points("acc of owls, 10 questions").values()] == [0.9]
    assert [point["value"] for point in accuracy.values()] == [0.25, 0.125, 0.125]
    assert (accuracy["full"]["low"], accuracy["full"]["high"]) == (pytest.approx(0.2304), pytest.approx(0.2696))
    assert [page.measures[name]["is_loss"] for name in ("loss, evaluated", "acc of owls")] == [True, False]
    for said in ("Evaluated: nightly", "owls acc", "0.250 ±0.010", "0.500 ±0.020", "owls 50"):
        assert said in page.text


def test_evaluations_are_found_where_a_run_was_moved_to(evaluated, tmp_path, monkeypatch):
    folder, _ = evaluated
    monkeypatch.chdir("/")
    folder.rename(tmp_path / "moved")
    reporting.command([str(tmp_path / "moved"), "--no_texts", "--output", str(tmp_path / "page.html")])
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "loss, evaluated" in page.measures
    assert "Not shown" not in page.text


def test_an_evaluation_of_another_network_is_not_shown_and_the_page_says_why(evaluated, tmp_path):
    folder, content = evaluated
    for change, said in (
        (lambda path: path.write_text(json.dumps({**content, "checkpoint": "other"})), "is of another checkpoint"),
        (lambda path: path.unlink(), "which is not there"),
    ):
        change(folder / JSON)
        reporting.command([str(folder), "--no_texts", "--output", str(tmp_path / "page.html")])
        page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
        assert list(page.measures) == ["loss, validation"]
        assert said in page.text


def test_what_stands_in_the_way_of_a_page_loses_no_evaluation(evaluated, tmp_path, caplog):
    caplog.set_level("INFO")
    folder, _ = evaluated
    output = tmp_path / "out"
    (output / HTML).mkdir(parents=True)
    options = ["--checkpoint", folder, "--text", tmp_path / "one.txt", "--tokens", 256, "--output", output]
    evaluating.command(list(map(str, options)))
    assert f"note: there is no {output / HTML}: cannot write" in caplog.text
    assert (output / JSON).is_file()
    (output / HTML).rmdir()
    evaluating.command([*map(str, options), "--no_report"])
    assert not (output / HTML).exists()


# --- in a browser -----------------------------------------------------------------------------------------------


def opened(browser, file, width=1200, scheme="light"):
    """The page, drawn; with what it logged, and what it asked for."""
    tab = browser.new_context(viewport={"width": width, "height": 850}, color_scheme=scheme).new_page()
    logged, asked = [], []
    tab.on("console", lambda message: logged.append(message.text))
    tab.on("pageerror", lambda error: logged.append(error.message))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(file.as_uri())
    tab.wait_for_selector("html[data-drawn]", timeout=60_000)
    return tab, logged, asked


def ring(tab):
    """Where the chosen rung stands."""
    return tab.locator("#trade-off .ring_marks path").get_attribute("transform")


@pytest.mark.slow
def test_the_slider_changes_what_the_page_shows(run, html, browser):
    tab, logged, asked = opened(browser, run[0] / "report.html")
    before = {"ring": ring(tab), "widths": tab.inner_html("#widths svg"), "chosen": tab.inner_text("#chosen")}
    tab.focus("#budget")
    tab.keyboard.press("Home")
    tab.wait_for_timeout(300)
    assert tab.input_value("#budget") == "0"
    assert "4.000 nats per token" in tab.inner_text("#chosen")
    after = {"ring": ring(tab), "widths": tab.inner_html("#widths svg"), "chosen": tab.inner_text("#chosen")}
    assert all(before[name] != after[name] for name in before)
    # another axis: points move, the dynamic router's appears
    assert "dynamic0.80" in tab.inner_text("#hidden")
    tab.check("input[value=flops]")
    tab.wait_for_timeout(300)
    assert tab.inner_text("#hidden") == ""
    assert ring(tab) != after["ring"]
    tab.click("summary")
    assert "shaded" in tab.frame_locator("#compute").locator("body").inner_text()
    assert logged == []
    assert asked == [(run[0] / "report.html").as_uri()]


@pytest.mark.slow
def test_another_quality_moves_the_points_and_takes_the_ladder_away(evaluated, browser, tmp_path):
    folder, _ = evaluated
    reporting.command([str(folder), "--no_texts", "--output", str(tmp_path / "page.html")])
    tab, logged, _ = opened(browser, tmp_path / "page.html")

    def drawn():
        tab.wait_for_timeout(300)
        axis = tab.locator("#trade-off .role-axis-title").last.text_content()
        places = tab.locator("#trade-off .points_marks path").evaluate_all("all => all.map(one => one.outerHTML)")
        return axis, places, tab.locator("#trade-off .ring_marks path").count()

    seen = [drawn()]
    for name in ("loss, evaluated", "acc of owls"):
        tab.select_option("#measure", name)
        seen.append(drawn())
    assert [axis for axis, _, _ in seen] == ["loss (nats per token)"] * 2 + ["acc of owls"]
    assert [ring for *_, ring in seen] == [1, 1, 0]
    assert seen[0][1] != seen[1][1] != seen[2][1]
    assert tab.locator("#trade-off .intervals_marks line").count() == len(seen[2][1])
    assert logged == []


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_light_and_dark(run, html, browser, scheme):
    tab, logged, _ = opened(browser, run[0] / "report.html", width=390, scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 22)"}[scheme]
    assert logged == []


@pytest.mark.slow
def test_without_scripts_the_table_is_there(run, html, browser):
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto((run[0] / "report.html").as_uri())
    assert "The charts need JavaScript" in tab.inner_text("body")
    assert tab.locator("tr", has_text="routed0.60").count() == 1
