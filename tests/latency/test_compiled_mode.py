"""Latency tables of compiled widths beside those of the network as it is: which one a budget goes by."""

import json
import shutil

import pytest
import torch

from flextron_lit import FlextronModel
from flextron_lit.commands import profile as command
from flextron_lit.costs import Workload
from flextron_lit.latency import block_times as profiler
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.latency.latency_table import COMPILED, LatencyTable, conditions, read_all
from tests.served import write

WORKLOAD = Workload(prompt_tokens=12, generated_tokens=5, threads=1)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served") / "flextron")


@pytest.fixture
def folder(served, tmp_path):
    return shutil.copytree(served, tmp_path / "flextron")


@pytest.fixture
def model(folder):
    return FlextronModel.from_pretrained(folder)


def measured(backbone, folder, speed=1.0):
    """A table of the mode in use, its times so much longer."""
    found = profiler.profile(backbone, WORKLOAD, budget_seconds=0.01, held_out=0).to_json()
    for phase in found["phases"].values():
        table = phase["table"]
        table["blocks"] = [[speed * each for each in row] for row in table["blocks"]]
        table["fixed"] *= speed
    return LatencyTable.from_json(found).write(folder)


@pytest.fixture
def tables(model, folder, as_traced):
    """Of both modes; compiled passes are said to take half as long."""
    shutil.rmtree(folder / "costs", ignore_errors=True)
    paths = [measured(model.backbone, folder)]
    model.compile_widths()
    paths.append(measured(model.backbone, folder, 0.5))
    model.compile_widths(False)
    return paths


def test_a_table_says_in_which_mode_it_was_measured(tables, model, folder):
    plain, compiled = tables
    assert compiled.name == plain.name.replace(".json", "-compiled.json")
    found = read_all(folder, model.backbone.space)
    assert [found[path].compiled for path in tables] == [False, True]
    # those of before say nothing, and were of the network as it is
    assert COMPILED not in json.loads(plain.read_text())["conditions"]
    assert conditions(model.backbone, WORKLOAD) == found[plain].conditions
    assert conditions(model.backbone, WORKLOAD, compiled=True) == found[compiled].conditions


def test_a_budget_goes_by_the_mode_in_use(tables, model, folder):
    of_mode = [known_tables(folder, model.backbone, WORKLOAD, None, compiled=each)[1] for each in (False, True)]
    assert [each.compiled for each in of_mode] == [False, True]
    plain, compiled = (each.tables()["latency"] for each in of_mode)
    for wanted, table in ((False, plain), (True, compiled), (False, plain)):
        model.compile_widths(wanted)
        (limit,) = model.flextron.routing().parse("latency=1.0")
        assert limit.table.sha256 == table.sha256
        assert limit.value == pytest.approx(table.full)
    assert plain.sha256 != compiled.sha256


@pytest.mark.parametrize("kept", [0, 1])
def test_the_other_modes_table_is_refused_unless_it_is_named(tables, model, folder, kept):
    tables[1 - kept].unlink()
    model.compile_widths(not kept)
    with pytest.raises(ValueError, match=r"(?s)other conditions.*compiled.*take it all the same with --latency"):
        model.flextron.routing()
    assert model.flextron.routing(tables[kept].stem).parse("latency=1.0")


def test_profile_says_what_each_mode_reaches(tables, model, folder):
    said = list(command.reach(folder, conditions(model.backbone, WORKLOAD)))
    assert len(said) == 1
    assert "as the network is" in said[0]
    tables[1].unlink()
    assert not list(command.reach(folder, conditions(model.backbone, WORKLOAD)))


def test_passes_of_compiled_widths_are_those_of_a_static_cache(model, as_traced, monkeypatch):
    seen = []
    run = profiler.Passes._run
    monkeypatch.setattr(profiler.Passes, "_run", lambda self, ids, cache: seen.append(cache) or run(self, ids, cache))
    model.compile_widths()
    half = model.backbone.space.uniform(mlp=0.5)
    passes = profiler.Passes(model.backbone, half, WORKLOAD)
    with model.backbone.evaluating():
        passes.prefill()
        for _ in range(3):
            passes.decode()
    assert not model.backbone.compiled.eager
    lengths = {int(layer.cumulative_length) for layer in seen[-1].layers}
    # each step was taken back
    assert lengths == {round(WORKLOAD.decode_context) - 1}


def generated(model, **settings):
    prompt = torch.arange(1, 9)[None]
    return model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=256, **settings)


def test_generate_takes_a_static_cache_where_nothing_else_is_asked_for(model, as_traced):
    expected = generated(model, budget="parameters=0.6")
    model.compile_widths()
    assert torch.equal(generated(model, budget="parameters=0.6"), expected)
    assert model.backbone.compiled.compilations
    assert not model.backbone.compiled.eager
    assert torch.equal(generated(model, budget="parameters=0.6", cache_implementation="dynamic"), expected)
    assert any("not static" in why for why in model.backbone.compiled.eager)
    # beams take another way through the cache
    several = {"num_beams": 2, "budget": "parameters=0.6"}
    compiled = generated(model, **several)
    model.compile_widths(False)
    assert torch.equal(generated(model, **several), compiled)
