"""The page of results is what its generator makes of the committed measurements."""

import importlib
import json
import shutil
from statistics import fmean

import numpy as np
import pytest

from tests.front_door import ROOT


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


def test_the_page_is_made_of_the_measurements(results):
    assert results.PAGE.read_text(encoding="utf-8") == results.page()


def test_another_measurement_makes_another_page(results, monkeypatch, tmp_path):
    shutil.copytree(results.RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "reconstruction.json"
    found = json.loads(path.read_text())
    next(iter(found.values()))["97.5M"]["own"] += 0.001
    path.write_text(json.dumps(found))
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    assert results.PAGE.read_text(encoding="utf-8") != results.page()


def test_draws_of_few_questions_in_which_the_full_network_is_at_chance_say_nothing(results):
    above_chance = importlib.import_module("above_chance")
    # a draw in eight has none of the right ones, where the share is not a number
    full, small = np.array([1.0, 1.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])
    assert np.isnan(above_chance.share(small, np.zeros(4), 0.0))
    low, high = above_chance.interval([(small, full, 0.0)], np.random.default_rng(0))
    assert 0 <= low < above_chance.share(small, full, 0.0) == 0.5 < high <= 1
    several = [(small, full, 0.0), (full, full, 0.0)]
    assert fmean(above_chance.share(*each) for each in several) == 0.75
