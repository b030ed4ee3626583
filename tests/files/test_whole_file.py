"""Files that are there whole or not at all."""

import json

import pytest

from flextron_lit.files.damage import read_rows
from flextron_lit.files.whole_file import json_text, whole_file, write_csv, write_json


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert [each.name for each in path.parent.iterdir()] == ["file.txt"]


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def killed():
        with whole_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_rows_need_not_have_the_same_columns(tmp_path):
    write_csv(tmp_path / "rows.csv", [{"a": 1}, {"b": "x, y", "a": None}])
    assert (tmp_path / "rows.csv").read_text().splitlines() == ["a,b", "1,", ',"x, y"']


def strict(text):
    """JSON as other languages read it: no NaN, no Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_number_that_is_none_is_null():
    nan, inf = float("nan"), float("inf")
    content = {"loss": nan, "rows": [{"perplexity": inf, "loss": 1.5}, (-inf, 2)], "name": "x", "none": None}
    expected = {"loss": None, "rows": [{"perplexity": None, "loss": 1.5}, [None, 2]], "name": "x", "none": None}
    assert strict(json_text(content)) == strict(json_text(content, indent=None)) == expected
    assert json_text(content, indent=None).count("\n") == 1


def test_rows_are_read_with_numbers_where_null_was_written(tmp_path):
    write_json(tmp_path / "rows.json", [{"step": 1, "loss": float("nan"), "losses": {"a": float("inf"), "b": 2.0}}])
    assert strict((tmp_path / "rows.json").read_text())
    (row,) = read_rows(tmp_path / "rows.json")
    assert row["loss"] != row["loss"]
    assert row["losses"]["a"] != row["losses"]["a"]
    assert (row["step"], row["losses"]["b"]) == (1, 2.0)


def test_the_error_of_a_full_disk_names_the_file(tmp_path):
    path = tmp_path / "it.json"
    write_json(path, [1])
    # where writing ends as on a full disk
    path.with_name("it.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_json(path, [2])
    assert path.read_text() == "[\n 1\n]\n"
    write_json(path, [2])
    assert path.read_text() == "[\n 2\n]\n"
