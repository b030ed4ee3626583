"""The page of results is what its generator makes of the committed measurements."""

import importlib
import json
import shutil

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
