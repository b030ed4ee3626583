"""Whatever has happened to a file, reading it ends with a result or one line that says which it is."""

import json

import pytest

from flextron_lit.files.damage import read_json
from tests.fuzz import MOST, TARGETS, fuzz, make


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("cwd", "beside"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return make(tmp_path / "beside" / "files")


def check(found, examples):
    assert sum(found.counts[name] for name in TARGETS) == examples
    assert found.wrong == {}
    assert found.counts["refused"] > found.counts["accepted"] > 0
    print(dict(found.counts))


def test_some_hundred_files(folder):
    check(fuzz(folder, 150), 150)


@pytest.mark.slow
@pytest.mark.parametrize("series", range(1, 5))
def test_ten_thousand_files(folder, series):
    """A quarter of them each. Prints how many of which (pytest -s)."""
    check(fuzz(folder, 2500, series), 2500)


def test_a_foreign_error_would_be_found(folder, monkeypatch):
    def careless(folder):
        return json.loads((folder / "selection.json").read_text())["widths"]["layers.0.mlp"]

    monkeypatch.setattr("tests.fuzz.TARGETS", {"selection.json": (careless,)})
    found = fuzz(folder, 20)
    assert {kind for _, kind, *_ in found.wrong} >= {"KeyError", "JSONDecodeError"}


def test_what_fills_the_memory_would_be_found(folder, monkeypatch):
    monkeypatch.setattr("tests.fuzz.TARGETS", {"selection.json": (lambda _: None,)})
    monkeypatch.setattr("tests.fuzz.peak", iter(range(0, 10**6, MOST + 1)).__next__)
    assert [kind for _, kind in fuzz(folder, 2).wrong] == [f"{MOST + 1} MB"]


@pytest.mark.parametrize("content", ["NaN", "[-Infinity]", '{"a": 1e999}', r'["\uD800"]'])
def test_what_is_no_number_or_character_is_no_json(tmp_path, content):
    path = tmp_path / "it.json"
    path.write_text(content)
    json.loads(content)
    with pytest.raises(ValueError, match="is no number|surrogates not allowed"):
        read_json(path)
