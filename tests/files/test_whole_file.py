"""Files that are there whole or not at all."""

import pytest

from flextron_lit.files.whole_file import whole_file, write_csv


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
