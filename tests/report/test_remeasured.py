"""The end of a pipeline on a machine whose times are known: what was promised of latencies, and what is measured."""

import json
from dataclasses import replace

import pytest
import torch

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.costs import COUNTED
from flextron_lit.latency import block_times
from flextron_lit.latency.block_times import Passes
from flextron_lit.report import remeasured, summary
from flextron_lit.space import SubNetwork
from tests import served

BUDGETS = (0.9, 0.7)
DYNAMIC_TAKES = 0.83


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    routers = served.latency_router, served.dynamic_router
    made = served.write(tmp_path_factory.mktemp("end") / "flextron", routers=routers)
    served.latency_table(load_elastic(str(made)).backbone, 16).write(made)
    return made


@pytest.fixture
def machine(monkeypatch):
    """Narrower networks take `late` more of the full one's time than tables say; all takes `pace` times as long."""
    state = {"late": 0.0, "pace": 1.0, "ran": []}

    def run(self, ids, cache):
        table = COUNTED["prefill_flops" if ids.shape[1] > 1 else "decode_flops"](self.backbone, self.workload)
        static = isinstance(self.selection, SubNetwork)
        ratio = table.ratio(self.selection) if static else DYNAMIC_TAKES
        state["ran"].append(self.selection)
        state["last"] = state["pace"] * table.full * (ratio + state["late"] * (ratio < 1)) / 1e3

    monkeypatch.setattr(Passes, "_run", run)
    monkeypatch.setattr(block_times.DynamicCache, "crop", lambda self, length: None)
    monkeypatch.setattr(block_times, "seconds", lambda run, device: run() or state["last"])
    monkeypatch.setattr(remeasured, "mixed_text", lambda _, workload: torch.ones(1, workload.total_tokens).long())
    monkeypatch.setattr(remeasured, "SECONDS", 0.01)
    return state


def rows(folder):
    names = [("full", 1.0, ""), *((f"routed{b:.2f}", b, "static") for b in BUDGETS), ("dynamic0.80", 0.8, "dynamic")]
    widths = {"mlp_width": 1.0, "attention_width": 1.0}
    made = [{"name": n, "budget": b, "router": r, "losses": {"text": 2.0}, **widths} for n, b, r in names]
    return summary.with_costs(made, load_elastic(str(folder)))


def table(folder):
    return served.latency_table(load_elastic(str(folder)).backbone, 16).tables()["latency"]


def test_what_is_measured_is_what_was_promised_where_the_table_is_true(folder, machine):
    found = rows(folder)
    full, *routed, dynamic = found
    for row in routed:
        answer = load_elastic(str(folder)).answer(row["budget"]).sub_network
        assert row["budget_ratio"] == pytest.approx(table(folder).ratio(answer))
        assert row["over_budget"] == pytest.approx(row["budget_ratio"] - row["budget"])
        assert row["over_budget"] <= 1e-9
    assert full["latency_ratio"] == 1
    # a budget of FLOPs promised no latency
    assert dynamic["latency_ratio"] == pytest.approx(DYNAMIC_TAKES)
    assert "over_budget" not in dynamic
    assert [*remeasured.told(found)] == ["Measured again, no latency budget is exceeded."]


def test_a_miss_is_said_plainly(folder, machine):
    true = rows(folder)
    machine["late"] = 0.2
    found = rows(folder)
    for row, before in zip(found[1:], true[1:], strict=True):
        assert row["latency_ratio"] == pytest.approx(before["latency_ratio"] + 0.2)
    said = [*remeasured.told(found)]
    assert len(said) == len([row for row in found if row.get("over_budget", 0) > 0.03]) > 0
    worst = max(found[1:3], key=lambda row: row["over_budget"])
    assert any(
        f"the static answer to {worst['budget']:g} of the latency takes {worst['budget_ratio']:.3f} ± 0.000" in line
        and f"{100 * worst['over_budget']:.1f} points more" in line
        for line in said
    )


def test_noise_is_no_miss():
    row = {"name": "routed0.90", "budget": 0.9, "router": "static", "cost": "latency", "budget_ratio": 0.95}
    sure, unsure = ({**row, "over_budget": 0.05, "budget_spread": spread} for spread in (0.01, 0.03))
    assert next(remeasured.told([sure])).startswith("Missed: ")
    assert [*remeasured.told([unsure])] == [
        "Measured again, no latency budget is exceeded by more than 5.0 points of the full network's."
    ]


def test_milliseconds_have_one_scale_however_slow_the_machine_is(folder, machine):
    first = rows(folder)
    machine["pace"] = 3.0
    second = rows(folder)
    full = table(folder).full
    for found in (first, second):
        assert found[0]["latency_ms"] == pytest.approx(full)
        assert all(row["latency_ms"] == pytest.approx(row["latency_ratio"] * full) for row in found)
    assert [row["latency_ms"] for row in second] == pytest.approx([row["latency_ms"] for row in first])
    assert next(remeasured.told(second)) == (
        "All took 3.00 times as long as when the latency table was measured; milliseconds are of then."
    )
    assert not any("All took" in line for line in remeasured.told(first))


def test_what_was_promised_of_another_request_is_not_judged(folder, machine, tmp_path):
    def dynamic(backbone):
        """For the latency of a longer request."""
        return replace(served.dynamic_router(backbone), table=long_table(backbone).tables()["latency"])

    def long_table(backbone):
        static = served.latency_table(backbone, 64)
        phases = {name: replace(p, table=replace(p.table, reference=p.table.full)) for name, p in static.phases.items()}
        return replace(static, conditions=static.conditions | {"execution": "dynamic"}, phases=phases)

    made = served.write(tmp_path / "flextron", routers=(served.latency_router, dynamic))
    backbone = load_elastic(str(made)).backbone
    for each in (served.latency_table(backbone, 16), long_table(backbone)):
        each.write(made)
    found = {row["name"]: row for row in rows(made)}
    assert "over_budget" in found["routed0.90"]
    assert found["dynamic0.80"]["cost"] == "latency"
    assert found["dynamic0.80"]["latency_ratio"] == pytest.approx(DYNAMIC_TAKES)
    assert "over_budget" not in found["dynamic0.80"]


def test_the_full_network_is_no_row_of_its_own_to_measure(folder, machine):
    rows(folder)
    # it runs beside each of the three others, and more often than any
    full = load_elastic(str(folder)).backbone.space.full()
    names = {json.dumps(s.to_json()) if isinstance(s, SubNetwork) else "dynamic" for s in machine["ran"]}
    assert len(names) == 4
    assert machine["ran"].count(full) > len(machine["ran"]) / 2


def test_a_summary_of_an_earlier_release_is_shown_and_has_ratios():
    earlier = [
        {"name": n, "budget": b, "router": r, "losses": {"text": 2.0}, "latency_ms": ms, "parameters": 9}
        | {"mlp_width": 1.0, "attention_width": 1.0}
        for n, b, r, ms in (("full", 1.0, "", 4000.0), ("routed0.90", 0.9, "static", 3700.0))
    ]
    assert [remeasured.ratio_of(row, earlier) for row in earlier] == [1.0, 0.925]
    assert remeasured.ratio_of({"name": "full"}, []) is None
    assert [*remeasured.told(earlier)] == []
    assert summary.shown(earlier).row_count == 2
