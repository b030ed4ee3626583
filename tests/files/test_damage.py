"""One clear error for whatever reading a file raises."""

import json

import pytest

from flextron_lit.files.damage import damage, read_json, read_rows
from flextron_lit.files.whole_file import write_json


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": []}', '{"a": {}}', '{"a": {"b": null}}', "\x80"])
def test_what_is_not_as_expected_is_damaged(tmp_path, content):
    path = tmp_path / "it.json"

    def read():
        with damage(path, "make it again"):
            return int(read_json(path)["a"]["b"])

    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"it.json is damaged \(\w+: .*\); make it again"):
        read()
    write_json(path, {"a": {"b": 3}})
    assert read() == 3


def test_what_may_not_be_read_need_not_be_damaged(tmp_path):
    def read():
        with damage(tmp_path, "make it again"):
            raise PermissionError("not yours")

    with pytest.raises(PermissionError, match="not yours"):
        read()


def test_a_table_that_is_not_there_has_no_rows(tmp_path):
    path = tmp_path / "rows.json"
    assert read_rows(path) == []
    write_json(path, [{"step": 1}, {"step": 2}])
    assert read_rows(path) == json.loads(path.read_text()) == [{"step": 1}, {"step": 2}]
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=r"rows.json is damaged .*; restore it, or delete it"):
        read_rows(path)
