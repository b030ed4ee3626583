"""An answer to a budget of a latency says by how much it may miss."""

import json
from dataclasses import replace

import pytest

from flextron_lit import FlextronModel
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.commands import generate, select
from flextron_lit.latency.latency_table import HeldOut
from tests import served

MISSES = {"prefill": 0.02, "decode": 0.05}
BUDGET = "latency=0.8"


def checked(table):
    """The same, off by so much in the worst of two networks."""
    rows = {name: (HeldOut((), 0.7, 0.7 - miss), HeldOut((), 0.5, 0.501)) for name, miss in MISSES.items()}
    return replace(table, phases={name: replace(p, held_out=rows[name]) for name, p in table.phases.items()})


def dynamic_table(backbone):
    """As if routing took a tenth, and with a miss of its own."""
    static = served.latency_table(backbone, 16)
    phases = {}
    for name, phase in static.phases.items():
        full = phase.table.full
        routed = replace(phase.table, fixed=phase.table.fixed + 0.1 * full, reference=full)
        phases[name] = replace(phase, table=routed, held_out=(HeldOut((), 0.7, 0.77, mixture=1),))
    return replace(static, conditions=static.conditions | {"execution": "dynamic"}, phases=phases)


def dynamic_router(backbone):
    return replace(served.dynamic_router(backbone), table=dynamic_table(backbone).tables()["latency"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = served.write(tmp_path_factory.mktemp("miss") / "flextron", routers=(served.latency_router, dynamic_router))
    backbone = load_elastic(str(made)).backbone
    for table in (checked(served.latency_table(backbone, 16)), dynamic_table(backbone)):
        table.write(made)
    return made


@pytest.fixture(scope="module")
def table(folder):
    return checked(served.latency_table(load_elastic(str(folder)).backbone, 16))


def test_the_request_misses_as_its_passes_do(table):
    times = {name: phase.table.full for name, phase in table.phases.items()}
    assert table.may_miss == pytest.approx(MISSES | {"latency": table.workload.of_request(times, MISSES)})
    assert 0.02 < table.may_miss["latency"] < 0.05
    # a phase that nobody checked leaves open what the request misses
    phases = table.phases | {"decode": replace(table.phases["decode"], held_out=())}
    assert replace(table, phases=phases).may_miss == {"prefill": pytest.approx(0.02)}


def test_the_model_says_so(folder, table):
    model = FlextronModel.from_pretrained(folder)
    assert model.set_budget(BUDGET).may_miss == {"latency": pytest.approx(table.may_miss["latency"])}
    routing = model.flextron.routing()
    several = routing.misses(routing.parse("decode<=0.9,prefill<=0.9,parameters<=0.95"))
    assert several == pytest.approx({"decode": 0.05, "prefill": 0.02})
    # the controls: what was counted misses nothing, nor does the full network
    assert routing.misses(routing.parse("parameters<=0.95")) == {}
    assert model.set_budget("latency=1.0").may_miss == {}


def test_select_says_so(folder, table, capsys):
    points = f"{100 * table.may_miss['latency']:.1f} points"
    select.command(["--checkpoint", str(folder), "--budget", BUDGET])
    assert f"may miss latency by {points} of the full network's" in " ".join(capsys.readouterr().out.split())
    select.command(["--checkpoint", str(folder), "--budget", BUDGET, "--json"])
    assert json.loads(capsys.readouterr().out)["may_miss"] == pytest.approx({"latency": table.may_miss["latency"]})


def test_generate_says_so(folder, table, capsys):
    options = ["--checkpoint", str(folder), "--prompt", "Ada", "--max_new_tokens", "2"]
    generate.command([*options, "--budget", BUDGET])
    points = f"{100 * table.may_miss['latency']:.1f} points"
    assert f"may miss latency by {points} of the full network's" in capsys.readouterr().err
    generate.command([*options, "--budget", BUDGET, "--json"])
    assert json.loads(capsys.readouterr().out)["may_miss"] == pytest.approx({"latency": table.may_miss["latency"]})
    generate.command([*options, "--json"])
    assert json.loads(capsys.readouterr().out)["may_miss"] == {}
    # a dynamic router goes by its own table
    generate.command([*options, "--budget", "0.8", "--dynamic", "--json"])
    assert json.loads(capsys.readouterr().out)["may_miss"] == pytest.approx({"latency": 0.07})
