from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback

from flextron_lit import checkpoint
from flextron_lit.callbacks import BudgetSampling, FlextronCheckpointWriter, LatencyProfiling, latency_profiling
from flextron_lit.costs import DYNAMIC_COUNTED, Workload, dynamic_table
from flextron_lit.latency.drift import Drift, Fresh
from flextron_lit.latency.latency_table import HeldOut, read_all
from flextron_lit.latency.recheck import Rechecked
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages import Calibration, ElasticTraining
from tests.stages.training import PLAN, SPACE, TINY, Plan, fit, stage

WORKLOAD = Workload(prompt_tokens=8, generated_tokens=3, threads=1)


@pytest.fixture
def measured(monkeypatch):
    """Which tables were measured."""
    calls = []
    for name in ("profile", "profile_dynamic"):
        original = getattr(latency_profiling, name)

        def counted(*args, name=name, original=original, **settings):
            calls.append(name)
            return original(*args, **settings)

        monkeypatch.setattr(latency_profiling, name, counted)
    return calls


def profiling():
    # what a busy machine would say of a table is another matter
    return LatencyProfiling(WORKLOAD, seconds=0.1, held_out=1, recheck=0)


def test_a_table_is_measured_once_and_goes_along_with_the_checkpoint(tmp_path, measured):
    module = stage()
    sampling = BudgetSampling(k=2, strategies={"stratified": 1.0}, cost="latency")
    fit(module, profiling(), sampling, FlextronCheckpointWriter(), default_root_dir=tmp_path / "one")
    assert len(measured) == 1
    written = read_all(tmp_path / "one" / "flextron", module.backbone.space)
    assert list(written.values()) == [module.latency]
    assert {path.relative_to(tmp_path / "one" / "flextron").as_posix() for path in written} <= set(
        checkpoint.verify(tmp_path / "one" / "flextron")
    )
    again = stage()
    fit(again, profiling(), sampling, default_root_dir=tmp_path / "one")
    assert again.latency == module.latency
    later = ElasticTraining(str(tmp_path / "one" / "flextron"))
    fit(later, profiling(), Plan(PLAN), FlextronCheckpointWriter(), default_root_dir=tmp_path / "two")
    assert later.latency == module.latency
    assert len(measured) == 1
    assert read_all(tmp_path / "two" / "flextron", later.backbone.space) != {}
    longer = LatencyProfiling(Workload(prompt_tokens=9, generated_tokens=3, threads=1), seconds=0.1, held_out=0)
    fit(stage(), longer, Plan(), default_root_dir=tmp_path / "one")
    assert len(measured) == 2


def test_measuring_changes_nothing_that_is_drawn(tmp_path):
    class Draw(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.drawn = torch.rand(3)

    draws = []
    for callbacks in ([], [profiling()]):
        torch.manual_seed(5)
        draw = Draw()
        fit(stage(), *callbacks, Plan(), draw, default_root_dir=tmp_path / str(len(draws)))
        draws.append(draw.drawn)
    assert torch.equal(*draws)


def test_a_table_of_other_widths_does_not_go_along(tmp_path, measured):
    fit(stage(), profiling(), Plan(), FlextronCheckpointWriter(), default_root_dir=tmp_path / "one")
    other = ElasticTraining(str(tmp_path / "one" / "flextron"), space=SpaceConfig(mlp=[64, 128], attention=[2, 4]))
    fit(other, Plan([SubNetwork((0, 0, 1, 1, 0, 1))]), FlextronCheckpointWriter(), default_root_dir=tmp_path / "two")
    assert (tmp_path / "one" / "flextron" / "costs").is_dir()
    assert not (tmp_path / "two" / "flextron" / "costs").exists()


def test_a_latency_that_nobody_measured_is_refused(tmp_path):
    sampling = BudgetSampling(strategies={"stratified": 1.0}, cost="latency")
    with pytest.raises(
        ValueError, match="no cost 'latency'; there are parameters, .*memory. Latencies need callbacks.Latency"
    ):
        fit(stage(), sampling, default_root_dir=tmp_path)


@pytest.mark.parametrize("settings", [{"seconds": 0.0}, {"held_out": -1}, {"recheck": -1.0}])
def test_a_wrong_setting_is_refused(settings):
    with pytest.raises(ValueError, match="seconds must be above 0 and held_out 0 or more"):
        LatencyProfiling(**settings)


class Routed(ElasticTraining):
    """Stands in for a stage whose tokens choose on their own."""

    dynamic = True


def routed():
    return Routed(TINY, space=SPACE, calibration=Calibration(tokens=0), clip_norm=1e9)


def test_a_dynamic_stage_gets_the_table_of_a_dynamic_router(tmp_path, measured):
    static = stage()
    fit(static, profiling(), Plan(), default_root_dir=tmp_path)
    module = routed()
    fit(module, profiling(), Plan(), FlextronCheckpointWriter(), default_root_dir=tmp_path)
    assert measured == ["profile", "profile_dynamic"]
    assert (static.latency.execution, module.latency.execution) == ("static", "dynamic")
    space = module.backbone.space
    assert list(read_all(tmp_path / "flextron", space, "dynamic").values()) == [module.latency]
    assert list(read_all(tmp_path / "flextron", space).values()) == [static.latency]
    for name in ("latency", "prefill", "decode"):
        assert module.cost_table(name) == module.latency.tables()[name]
    again, before = routed(), stage()
    fit(again, profiling(), Plan(), default_root_dir=tmp_path)
    fit(before, profiling(), Plan(), default_root_dir=tmp_path)
    assert again.latency == module.latency
    assert before.latency == static.latency
    assert len(measured) == 2


def test_a_dynamic_stage_counts_what_grouped_execution_computes(tmp_path):
    module, static = routed(), stage()
    for each in (module, static):
        fit(each, Plan(), default_root_dir=tmp_path)
    for name in DYNAMIC_COUNTED:
        assert module.cost_table(name) == dynamic_table(module.backbone, name, module.workload)
        assert module.cost_table(name) is module.cost_table(name)
        assert module.cost_table(name).full == static.cost_table(name).full
        assert static.cost_table(name).reference is None
    with pytest.raises(ValueError, match="kv_bytes is the same whatever a dynamic router chooses: .*static router"):
        module.cost_table("kv_bytes")
    assert static.cost_table("kv_bytes").full > 0
    with pytest.raises(ValueError, match="no cost 'latency'; there are flops, prefill_flops, decode_flops. Latencies"):
        module.cost_table("latency")


# --- a table of before -------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch):
    """What fresh networks say of tables, and of which they were asked."""
    state = {"miss": 0.0, "asked": []}

    def recheck(backbone, known, *, budget_seconds):
        state["asked"].append(known)
        row = HeldOut(backbone.space.smallest().choices, 0.5, 0.5 + state["miss"])
        phases = {name: replace(phase, rechecked=(row,)) for name, phase in known.phases.items()}
        drifts = {"latency": Drift([Fresh(0.5, 0.5 + state["miss"], 0.0)])}
        return Rechecked(replace(known, phases=phases), drifts, 1.0)

    monkeypatch.setattr(latency_profiling, "recheck", recheck)
    return state


def checking():
    return LatencyProfiling(WORKLOAD, seconds=0.1, held_out=1)


def test_a_table_of_an_earlier_stage_is_checked_before_it_is_taken_over(tmp_path, measured, checked):
    first = stage()
    fit(first, checking(), Plan(), FlextronCheckpointWriter(), default_root_dir=tmp_path / "one")
    assert checked["asked"] == []
    later = ElasticTraining(str(tmp_path / "one" / "flextron"))
    checked["miss"] = 0.02
    fit(later, checking(), Plan(PLAN), FlextronCheckpointWriter(), default_root_dir=tmp_path / "two")
    assert checked["asked"] == [first.latency]
    assert len(measured) == 1
    # the same costs, with what was seen of them now, which goes along
    assert later.latency.tables() == first.latency.tables()
    assert all(phase.rechecked for phase in later.latency.phases.values())
    assert later.latency.may_miss["latency"] >= 0.02
    assert list(read_all(tmp_path / "two" / "flextron", later.backbone.space).values()) == [later.latency]
    # its own table a run keeps as it is
    again = ElasticTraining(str(tmp_path / "one" / "flextron"))
    fit(again, checking(), Plan(PLAN), default_root_dir=tmp_path / "two")
    assert again.latency == later.latency
    assert len(checked["asked"]) == 1


def test_a_table_that_holds_no_more_is_measured_anew_and_that_is_said(tmp_path, measured, checked, monkeypatch):
    said = []
    monkeypatch.setattr(latency_profiling, "rank_zero_info", said.append)
    first = stage()
    fit(first, checking(), Plan(), FlextronCheckpointWriter(), default_root_dir=tmp_path / "one")
    checked["miss"] = 0.05
    later = ElasticTraining(str(tmp_path / "one" / "flextron"))
    fit(later, checking(), Plan(PLAN), FlextronCheckpointWriter(), default_root_dir=tmp_path / "two")
    assert len(measured) == 2
    assert "holds no more" in said[-2]
    assert "measured, wrote" in said[-1]
    assert later.latency.tables()["latency"].sha256 != first.latency.tables()["latency"].sha256
    assert list(read_all(tmp_path / "two" / "flextron", later.backbone.space).values()) == [later.latency]
    # what was made with the one before lies in its own checkpoint still
    assert list(read_all(tmp_path / "one" / "flextron", first.backbone.space).values()) == [first.latency]
