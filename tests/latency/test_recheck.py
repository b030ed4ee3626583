"""A table on a machine whose times are known, and that may change after it was measured."""

from dataclasses import replace

import pytest

from flextron_lit.costs.workload import Workload
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.latency import routed_times
from flextron_lit.latency.block_times import profile
from flextron_lit.latency.drift import Drift, Fresh
from flextron_lit.latency.latency_table import LatencyTable
from flextron_lit.latency.recheck import recheck
from flextron_lit.latency.request import measure_request
from flextron_lit.latency.routed_times import profile_dynamic
from flextron_lit.space import SpaceConfig, SubNetwork
from tests.conftest import make_llama
from tests.latency.known_machine import put_in_place

WORKLOAD = Workload(batch_size=2, prompt_tokens=12, generated_tokens=5, threads=1)
PROFILES = {"static": profile, "dynamic": profile_dynamic}


@pytest.fixture
def backbone():
    return ElasticBackbone(make_llama(num_hidden_layers=6), SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]))


@pytest.fixture
def machine(monkeypatch):
    """Blocks of each kind save up to 0.3 of a pass, and less where both kinds save at once, if so asked."""
    state = {"saves": 1.0, "shared": 0.0, "speed": 1.0, "decode": 1.0, "noise": 0.0, "passes": 0}

    def run(self, ids, cache):
        space = self.backbone.space
        static = isinstance(self.selection, SubNetwork)
        shares = space.one_hot(self.selection) if static else self.selection.shares
        narrow = {"attention": 0.0, "mlp": 0.0}
        for row, block in zip(shares.tolist(), space.blocks, strict=True):
            width = sum(share * width for share, width in zip(row, block.widths, strict=False)) / block.full
            narrow[block.kind] += (1 - width) / (len(space) / 2)
        one, other = (0.3 * each for each in narrow.values())
        saved = state["saves"] * (one + other - state["shared"] * one * other)
        passes = state["decode"] if ids.shape[1] == 1 else ids.shape[1]
        state["passes"] += 1
        noise = 1 + state["noise"] * (-1) ** (state["passes"] // 3)
        state["last"] = (1 - saved) * passes * state["speed"] * noise / 1e3

    return put_in_place(monkeypatch, run, state, mlp=0.05)


@pytest.mark.parametrize("execution", PROFILES)
def test_a_table_holds_where_the_machine_is_the_same(backbone, machine, execution):
    known = PROFILES[execution](backbone, WORKLOAD, budget_seconds=0.05, held_out=6)
    found = recheck(backbone, known, budget_seconds=0.01)
    assert found.holds
    assert set(found.drifts) == {"prefill", "decode", "latency"}
    assert all(drift.largest == pytest.approx(0, abs=1e-6) for drift in found.drifts.values())
    assert found.pace == pytest.approx(1)
    assert "still holds" in found.told()
    # a machine that is slower in all holds its ratios, and says so
    machine["speed"] = 1.5
    found = recheck(backbone, known, budget_seconds=0.01)
    assert found.holds
    assert "the full network takes 1.50 times as long as then" in found.told()


@pytest.mark.parametrize("execution", PROFILES)
def test_it_holds_no_more_where_widths_save_less(backbone, machine, execution):
    known = PROFILES[execution](backbone, WORKLOAD, budget_seconds=0.05, held_out=6)
    machine["saves"] = 0.7
    found = recheck(backbone, known, budget_seconds=0.01)
    assert not found.holds
    assert found.drifts["latency"].mean > 0.03
    assert "holds no more" in found.told()


def test_what_is_measured_again_is_fresh_and_goes_into_the_table_and_its_miss(backbone, machine):
    known = profile(backbone, WORKLOAD, budget_seconds=0.05, held_out=6)
    machine["saves"] = 0.95
    found = recheck(backbone, known, budget_seconds=0.01, networks=5)
    assert found.holds
    for name, phase in found.table.phases.items():
        assert phase.table.sha256 == known.phases[name].table.sha256
        assert len(phase.rechecked) == 5
        assert not {row.choices for row in phase.rechecked} & {row.choices for row in phase.held_out}
        assert phase.held_out == known.phases[name].held_out
    assert all(found.table.may_miss[name] > known.may_miss[name] + 1e-3 for name in ("prefill", "decode", "latency"))
    assert found.table.may_miss["prefill"] == pytest.approx(found.drifts["prefill"].largest)
    assert LatencyTable.from_json(found.table.to_json()) == found.table != known


def test_what_noise_hides_is_said_and_not_kept(backbone, machine):
    known = profile(backbone, WORKLOAD, budget_seconds=0.05, held_out=6)
    sure = recheck(backbone, known, budget_seconds=0.01)
    assert sure.sure
    machine["noise"] = 0.3
    found = recheck(backbone, known, budget_seconds=0.01)
    assert not found.sure
    assert found.table == known != sure.table
    drifts = {name: Drift([Fresh(0.5, 0.52, 0.05)]) for name in found.drifts}
    assert "still holds, as far as so much noise tells" in replace(found, drifts=drifts).told()


def test_the_request_is_measured_by_its_passes(backbone, machine):
    space = backbone.space
    machine["decode"] = 3.0
    small = {"small": space.smallest()}
    found = measure_request(backbone, WORKLOAD, lambda _: small, 0.01)
    assert found.full == pytest.approx((12 + 4 * 3) / 1e3)
    prefill, decode, request = (found.ratios[name]["small"].value for name in ("prefill", "decode", "latency"))
    assert request == pytest.approx((12 * prefill + 12 * decode) / 24)
    assert WORKLOAD.of_request({"prefill": 12, "decode": 3}, {"prefill": 1.0, "decode": 0.5}) == pytest.approx(0.75)
    assert replace(WORKLOAD, generated_tokens=1).of_request({"prefill": 12}, {"prefill": 0.4}) == pytest.approx(0.4)


def test_a_sum_of_savings_that_is_too_large_is_corrected(backbone, machine):
    # what both kinds save by themselves, of which the table is made, they do not save together
    machine["shared"] = 2.0
    plain, found = (profile(backbone, WORKLOAD, budget_seconds=0.05, held_out=count) for count in (3, 12))
    for name, phase in found.phases.items():
        assert phase.correction < 0.97
        assert plain.phases[name].correction == 1
        assert phase.table.full == pytest.approx(plain.phases[name].table.full)
        assert phase.error < 0.5 * plain.phases[name].error
    fresh = [recheck(backbone, table, budget_seconds=0.01, networks=8).drifts["latency"] for table in (plain, found)]
    assert abs(fresh[1].mean) < 0.5 * abs(fresh[0].mean)
    # the control: where they do, there is nothing to correct
    machine["shared"] = 0.0
    phases = profile(backbone, WORKLOAD, budget_seconds=0.05, held_out=12).phases
    assert all(phase.correction == pytest.approx(1) for phase in phases.values())


def test_the_table_of_a_dynamic_router_is_corrected_too(backbone, machine, monkeypatch):
    # as if a law had been found that promises a quarter too much
    exact = routed_times.fit
    monkeypatch.setattr(routed_times, "fit", lambda *a: replace(law := exact(*a), saved=more(law.saved)))

    def more(saved):
        return {probe: 1.25 * each for probe, each in saved.items()}

    found = profile_dynamic(backbone, WORKLOAD, budget_seconds=0.05, held_out=8)
    for phase in found.phases.values():
        assert phase.correction == pytest.approx(0.8, rel=0.02)
        assert phase.error < 0.01
