"""Tables of small Llamas are what their measurements say, with the mean and the range over seeds."""

import importlib
import json

import pytest

from tests.front_door import ROOT

ABOUT = {"machine": "a machine", "versions": {"torch": "2"}}


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(importlib.import_module("results"), "RESULTS", tmp_path)
    return importlib.import_module("results_small")


def rungs(losses):
    return {
        f"{size}, seed {seed}": {"parameters": 1e6, "loss": loss + seed}
        for size, loss in losses.items()
        for seed in (0, 1)
    }


def ladder_of(tmp_path, losses):
    flat = dict.fromkeys(losses, 6.0)
    found = {
        "about": ABOUT,
        "settings": {"tokens": 1000},
        "end to end": rungs(losses),
        "own projections": {f"0.04, seed {seed}": {"tokens": 40, "losses": flat, "answered": flat} for seed in (0, 1)},
        "nested": {f"0.04, seed {seed}": {"tokens": 1040, "losses": flat} for seed in (0, 1)},
    }
    (tmp_path / "ladder.json").write_text(json.dumps(found))


FALLING = {"0.25": 5.0, "0.5": 4.0, "0.75": 3.0, "1": 2.0}


def test_gaps_are_related_to_the_ladder_of_the_same_seed(small, tmp_path):
    ladder_of(tmp_path, FALLING)
    found = small.ladder()
    assert "| Flextron, own projections, 0.04 of N | 40 more | +0.500 (+0.000 to +1.000) |" in found["alike"]
    assert "| 5.500 (5.000 to 6.000) | 4.500" in found["alike"]
    assert "nested" not in found["answered"]


@pytest.mark.parametrize("missing", ["nested", "1, seed 1"])
def test_a_seed_counts_once_all_of_it_is_there(small, tmp_path, missing):
    ladder_of(tmp_path, FALLING)
    path = tmp_path / "ladder.json"
    found = json.loads(path.read_text())
    whole = small.ladder()
    (found if missing in found else found["end to end"]).pop(missing)
    path.write_text(json.dumps(found))
    assert whole["seeds"] == 2
    assert small.ladder().get("seeds", 0) == (0 if missing == "nested" else 1)


@pytest.mark.parametrize(("last", "said"), [(2.0, "in every seed"), (3.5, "its gaps say little")])
def test_a_ladder_that_does_not_fall_is_told(small, tmp_path, last, said):
    ladder_of(tmp_path, FALLING | {"1": last})
    assert said in small.ladder()["monotone"]


def test_a_ladder_that_falls_in_the_mean_alone_is_told(small):
    assert "in 1 of 2" in small.monotone({"0": [3.0, 2.0], "1": [2.4, 2.5]})


def test_changes_are_related_to_the_base_of_the_same_seed(small, tmp_path):
    def row(loss):
        return {"losses": dict.fromkeys(small.SHARES, loss), "before": dict.fromkeys(small.SHARES, 2 * loss)}

    found = {
        "about": ABOUT,
        "settings": {},
        "base": {"greedy, own, seed 0": row(3.0), "greedy, own, seed 1": row(4.0)},
        "sampling": {"uniform, seed 0": row(3.5), "uniform, seed 1": row(4.1)},
        "joint tuning": {"seed 0": {"router alone": row(2.5)}},
    }
    (tmp_path / "ablations.json").write_text(json.dumps(found))
    rows = small.ablations()
    assert "| sampling | uniform | 3.800 | 3.800 | 3.800 | 3.800 | +0.300 (+0.100 to +0.500) |" in rows["table"]
    assert "| joint tuning | router alone | 2.500 | 2.500 | 2.500 | 2.500 | -0.500 |" in rows["table"]
    assert "| greedy, own | 6.000 |" in rows["converted"]


def test_what_is_not_measured_is_left_out(small):
    assert small.ladder() == small.ablations() == {}
