"""The dynamic profiler on a machine whose times are known: a clock that counts work instead of seconds."""

import json
from dataclasses import replace

import pytest
import torch

from flextron_lit.costs import DYNAMIC_COUNTED, Workload
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.latency.block_times import Passes, profile
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.latency.latency_table import HeldOut, LatencyTable, conditions, find, read_all
from flextron_lit.latency.mixtures import shares
from flextron_lit.latency.routed_times import Observed, fit, profile_dynamic
from flextron_lit.space import LayerWidths, SpaceConfig, SubNetwork
from tests.conftest import SPACE, make_gpt2, make_llama
from tests.latency.known_machine import put_in_place
from tests.options import seed

WORKLOAD = Workload(batch_size=2, prompt_tokens=12, generated_tokens=5, threads=1)
ROUTING = 7.0
LAYERED = SpaceConfig(mlp=[16, 32, 64], attention=[0, 1, 4], layers={1: LayerWidths(mlp=[0, 8, 64], attention=[2, 4])})


@pytest.fixture
def backbone():
    return ElasticBackbone(make_llama(), SPACE)


def cost_of(kind, width):
    """Neurons cost 1 each, KV groups 8, and no width is free."""
    return 3 + width * (8 if kind == "attention" else 1)


def truth(space, mixture, routing=ROUTING):
    blocks = zip(space.blocks, mixture.tolist(), strict=True)
    rows = ((b, zip(b.widths, row, strict=False)) for b, row in blocks)
    return 50 + routing + sum(share * cost_of(b.kind, width) for b, row in rows for width, share in row)


@pytest.fixture
def machine(monkeypatch):
    """Times that are linear in the shares of the choices; routing costs, and noise on request."""
    state = {"noise": 0.0, "sorting": 0.0, "generator": torch.Generator().manual_seed(seed(0))}

    def run(self, ids, cache):
        static = isinstance(self.selection, SubNetwork)
        space = self.backbone.space
        mixture = space.one_hot(self.selection) if static else self.selection.shares
        noise = torch.randn((), generator=state["generator"]).item() * state["noise"]
        routing = 0 if static else ROUTING + state["sorting"] * self.selection.mixed
        state["last"] = truth(space, mixture, routing) * ids.shape[1] * (1 + noise) / 1e3

    return put_in_place(monkeypatch, run, state)


@pytest.mark.parametrize("config", [SPACE, LAYERED], ids=["alike", "layered"])
def test_the_table_gives_the_times_of_every_mixture(machine, config):
    backbone = ElasticBackbone(make_llama(), config)
    space = backbone.space
    found = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.1, held_out=6)
    for phase, tokens in (("prefill", 12), ("decode", 1)):
        table = found.phases[phase].table
        static = truth(space, space.one_hot(space.full()), 0) * tokens
        assert table.full == pytest.approx(static)
        assert table.cost(space.full()) == pytest.approx(static + ROUTING * tokens)
        for number in range(500, 530):
            mixture = shares(space, number)
            assert table.expected(mixture).item() == pytest.approx(truth(space, mixture) * tokens)
        assert found.phases[phase].error == pytest.approx(0, abs=1e-9)
        assert [row.mixture for row in found.phases[phase].held_out] == [10_002, 10_003, 10_006, 10_007, 10_010, 10_011]
        assert min(table.fixed, *(cost for row in table.blocks for cost in row)) >= 0
    request = found.tables()["latency"]
    assert request.full == pytest.approx(truth(space, space.one_hot(space.full()), 0) * (12 + 4))
    assert request.ratio(space.full()) > 1


def test_the_table_has_as_many_blocks_to_sort_as_a_trained_router(machine, backbone):
    machine["sorting"] = 20.0
    space = backbone.space
    prefill, decode = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.1, held_out=40).phases.values()
    static = truth(space, space.one_hot(space.full()), 0)
    sorting = prefill.table.cost(space.full()) / 12 - static - ROUTING
    assert 0.25 < sorting / 20 < 0.55
    # on mixtures like a trained router's the error goes both ways
    errors = [row.predicted / row.measured - 1 for row in prefill.held_out]
    assert abs(sum(errors) / len(errors)) < 0.3 * sum(map(abs, errors)) / len(errors)
    # the two sequences of a decode step seldom differ in a block
    assert 0 < decode.table.cost(space.full()) - static - ROUTING < 0.75 * sorting


def test_least_squares_finds_a_linear_law(backbone):
    space = backbone.space
    mixed = [n % 3 / 2 for n in range(14)]
    times = [truth(space, shares(space, 2 * n), ROUTING + 5 * mixed[n]) for n in range(14)]
    observed = [Observed(shares(space, 2 * n), mixed[n], times[n]) for n in range(14)]
    law = fit(space, observed)
    saved = law.saved
    assert law.largest == pytest.approx(truth(space, space.one_hot(space.full())))
    assert law.sorting == pytest.approx(5)
    assert set(saved) == {("attention", w) for w in (0, 1, 2)} | {("mlp", w) for w in (0, 16, 32)}
    for (kind, width), each in saved.items():
        assert each == pytest.approx(cost_of(kind, 4 if kind == "attention" else 64) - cost_of(kind, width))
    # a law that is not linear leaves an error
    curved = fit(space, [replace(each, time=each.time**2) for each in observed]).largest
    assert abs(curved / truth(space, space.one_hot(space.full())) ** 2 - 1) > 1e-3


def test_errors_count_relative_to_what_was_measured():
    space = ElasticBackbone(make_llama(), SpaceConfig(mlp=[64], attention=[4])).space
    mixture = space.one_hot(space.full()).double()
    law = fit(space, [Observed(mixture, 0.0, 1.0), Observed(mixture, 0.0, 3.0)])
    assert law.saved == {}
    assert law.sorting == pytest.approx(0)
    # smallest (x/1 - 1)^2 + (x/3 - 1)^2, and not the mean
    assert law.largest == pytest.approx((1 + 1 / 3) / (1 + 1 / 9))


def test_what_is_held_out_is_measured_apart_and_differs_by_layer(backbone, machine):
    machine["noise"] = 0.05
    phase = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.1, held_out=20).phases["prefill"]
    assert phase.error > 0
    assert phase.spread > 0
    assert all(row.choices == () for row in phase.held_out)
    layered = [shares(backbone.space, row.mixture) for row in phase.held_out[1::2]]
    assert not any(torch.equal(mixture[2:4], mixture[4:6]) for mixture in layered)
    assert len({row.measured for row in phase.held_out}) == 20
    other = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.1, held_out=2, seed=1).phases["prefill"]
    assert [row.mixture for row in other.held_out] == [20_002, 20_003]


def test_every_pass_is_grouped_but_the_reference_and_the_cache(backbone, monkeypatch):
    ran = []
    original = Passes._run

    def run(self, ids, cache):
        ran.append((isinstance(self.selection, SubNetwork), tuple(ids.shape)))
        original(self, ids, cache)

    monkeypatch.setattr(Passes, "_run", run)
    found = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.1, held_out=1)
    assert {shape for static, shape in ran if not static} == {(2, 12), (2, 1)}
    assert {shape for static, shape in ran if static} == {(2, 12), (2, 13), (2, 1)}
    for phase in found.phases.values():
        assert phase.table.full > 0
        assert phase.error >= 0
    assert set(found.tables()) == {"prefill", "decode", "latency"}


def test_a_space_without_a_choice_has_a_table(machine):
    backbone = ElasticBackbone(make_llama(), SpaceConfig(mlp=[64], attention=[4]))
    found = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.05, held_out=1).phases["decode"]
    assert found.table.smallest == pytest.approx(found.table.full + ROUTING)
    assert found.error == pytest.approx(0, abs=1e-9)


def test_a_workload_longer_than_learnt_positions_is_refused():
    learnt = ElasticBackbone(make_gpt2(), SPACE)
    with pytest.raises(ValueError, match="takes 129 positions, but the model has 128; lower prompt_tokens"):
        profile_dynamic(learnt, Workload(prompt_tokens=120, generated_tokens=10, threads=1))


# --- the file ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_is_not_a_static_table(backbone, machine, tmp_path):
    machine["noise"] = 0.01
    dynamic = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.1, held_out=3)
    path = dynamic.write(tmp_path)
    assert path.name == "dynamic-cpu-2x12+5-float32.json"
    assert LatencyTable.from_json(json.loads(json.dumps(dynamic.to_json()))) == dynamic
    assert read_all(tmp_path, backbone.space) == {}
    static_conditions = conditions(backbone, WORKLOAD)
    assert find(tmp_path, static_conditions) is None
    static = profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=3)
    beside = static.write(tmp_path)
    assert read_all(tmp_path, backbone.space) == {beside: static}
    assert read_all(tmp_path, backbone.space, "dynamic") == {path: dynamic}
    assert find(tmp_path, static_conditions) == (beside, static)
    assert find(tmp_path, conditions(backbone, WORKLOAD, "dynamic")) == (path, dynamic)
    longer = Workload(batch_size=2, prompt_tokens=99, generated_tokens=5, threads=1)
    assert find(tmp_path, conditions(backbone, longer, "dynamic")) is None


def test_each_is_refused_where_the_other_is_wanted(backbone, machine):
    dynamic = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.05, held_out=0)
    dynamic.check(conditions(backbone, WORKLOAD, "dynamic"))
    static = profile(backbone, WORKLOAD, budget_seconds=0.05, held_out=0)
    with pytest.raises(ValueError, match="(?s)execution: None -> 'dynamic'.*main.py profile`"):
        static.check(conditions(backbone, WORKLOAD, "dynamic"))
    with pytest.raises(ValueError, match="(?s)device.name.*main.py profile --dynamic`"):
        dynamic.check({"device": {"type": "cpu", "name": "abacus"}})


def test_a_static_table_is_written_as_it_always_was(backbone, machine):
    static = profile(backbone, WORKLOAD, budget_seconds=0.05, held_out=1).to_json()
    assert set(static["conditions"]) == {"device", "workload", "model", "versions"}
    for phase in static["phases"].values():
        assert set(phase["table"]) == {"name", "unit", "fixed", "blocks"}
        assert set(phase["held_out"][0]) == {"choices", "predicted", "measured"}
    old = json.loads(json.dumps(static))
    assert LatencyTable.from_json(old).execution == "static"
    assert LatencyTable.from_json(old).to_json() == static


def test_a_held_out_row_says_which_kind_it_is():
    assert HeldOut((1, 2), 0.5, 0.6).to_json() == {"choices": [1, 2], "predicted": 0.5, "measured": 0.6}
    assert HeldOut((), 0.5, 0.6, mixture=0).to_json()["mixture"] == 0


def test_known_costs_are_of_one_kind_of_execution(backbone, machine, tmp_path):
    other = Workload(prompt_tokens=7)
    counted, none = known_tables(tmp_path, backbone, other, None, execution="dynamic")
    assert none is None
    assert set(counted) == set(DYNAMIC_COUNTED)
    before = known_tables(tmp_path, backbone, other, None)
    dynamic = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.05, held_out=0)
    dynamic.write(tmp_path)
    assert known_tables(tmp_path, backbone, other, None) == before
    tables, chosen = known_tables(tmp_path, backbone, other, None, execution="dynamic")
    assert chosen == dynamic
    assert set(tables) == {"prefill", "decode", "latency", *DYNAMIC_COUNTED}
    assert tables["latency"].reference == tables["latency"].full > 0
    # what is counted is counted for the workload that was measured
    assert tables["flops"] == DYNAMIC_COUNTED["flops"](backbone, dynamic.workload) != counted["flops"]
    assert known_tables(tmp_path, backbone, other, "dynamic-cpu-2x12+5-float32", execution="dynamic")[1] == dynamic
    with pytest.raises(ValueError, match="no latency table 'latency-cpu-2x12"):
        known_tables(tmp_path, backbone, other, "latency-cpu-2x12+5-float32", execution="dynamic")
