"""One reader for all commands: files by the ends of their names, without what is no text, and both are said."""

import gzip
import json
import logging
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from flextron_lit.data import TextDomain
from flextron_lit.data.domain import domains_of
from flextron_lit.data.pieces import pieces
from flextron_lit.data.texts import documents
from tests.data.chat import turns

ROWS = '{"text": "one"}\n{"text": "two"}\n'


@pytest.fixture
def said(caplog, monkeypatch):
    """What was told since the last time of asking."""
    monkeypatch.setattr(logging.getLogger("flextron_lit"), "propagate", True)

    def said():
        lines = [record.getMessage() for record in caplog.records if record.name == "flextron_lit"]
        caplog.clear()
        return lines

    return said


def read(path, **settings):
    return list(documents(TextDomain(source=str(path), **settings)))


# --- by the ends of names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.jsonl", "data.JSONL", "data.ndjson", "data.NdJson"])
def test_rows_are_read_as_rows_whatever_the_case(tmp_path, name):
    path = tmp_path / name
    path.write_text(ROWS)
    assert read(path) == read(tmp_path) == ["one", "two"]
    assert list(documents(TextDomain(**domains_of([str(path)])["data"]))) == ["one", "two"]
    # as runs of before go on
    assert read(tmp_path, format="text") == [ROWS.strip()]


def test_every_file_of_a_folder_is_read_by_its_own_end_and_that_is_said(tmp_path, said):
    (tmp_path / "b.jsonl").write_text(ROWS)
    (tmp_path / "c.JSON").write_text(json.dumps(["x" * 250, "short"]))
    parquet.write_table(pyarrow.table({"text": ["three"]}), tmp_path / "d.PARQUET")
    for name in ("e.txt", "f.md", "g.csv", "LICENSE"):
        (tmp_path / name).write_text(name)
    for hidden in (".git/config", ".gitattributes", ".DS_Store", "sub/.ipynb_checkpoints/x.txt"):
        (tmp_path / hidden).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / hidden).write_bytes(b"\xff\0")
    assert read(tmp_path) == ["LICENSE", "one", "two", "x" * 250, "three", "e.txt", "f.md", "g.csv"]
    assert said() == [
        f"{tmp_path}: read by the ends of their names: 1 file as json, 1 file as jsonl, 1 file as parquet, 4 files as "
        "text (no end, .csv: none of .jsonl, .ndjson, .json, .parquet, so plain text; set format if not)",
        f"{tmp_path}: 4 hidden files left out",
    ]
    # nothing to say of plain text, nor where the format is set
    assert read(tmp_path, files="*.txt") == ["e.txt"]
    assert read(tmp_path, files="*.csv", format="text") == ["g.csv"]
    assert not [line for line in said() if "names" in line]
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "h.txt").write_text("h")
    assert read(tmp_path, files=".hidden/*") == ["h"]


def test_a_wheels_files_are_read_likewise(tmp_path, monkeypatch):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("w/a.JSONL", "\ufeff" + ROWS)
        archive.writestr("w/.b.txt", "hidden")
        archive.writestr("w/c.txt", "three")
    monkeypatch.setattr("flextron_lit.data.texts.fetch_wheel", lambda source: wheel)
    assert read(f"pypi:w==1.0#sha256={'0' * 64}") == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            gzip.compress(b"text", mtime=0),
            "a.txt is not UTF-8 text: it is compressed with gzip; let its name end in .gz",
        ),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], "a.txt.gz is damaged, or not what the end of its name says"),
        ("a.txt.xz", b"text", "a.txt.xz is damaged, or not what the end of its name says"),
        (
            "a.jsonl",
            gzip.compress(ROWS.encode(), mtime=0),
            "a.jsonl, line 1, is not UTF-8 text: it is compressed with gzip",
        ),
        ("a.zst", b"\x28\xb5\x2f\xfd\0\xff", "a.zst is damaged, or not what the end of its name says"),
        ("a.bin", b"\x28\xb5\x2f\xfd\0\xff", "a.bin is not UTF-8 text: it is compressed with zstd; let its name end"),
        ("a.zip", b"PK\x03\x04\0\0", "a.zip is not UTF-8 text: it is a zip archive"),
        ("a.txt", b"PAR1\0\0", "a.txt is not UTF-8 text: it is parquet; set format to parquet"),
        ("a.txt", "text".encode("utf-16"), "a.txt is not UTF-8 text: it is UTF-16; save it as UTF-8"),
        ("a.bin", b"ab\0cd", "a.bin is not UTF-8 text: byte 2 is 0x00; it is binary, take it out"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text: byte 3 is 0xe9; save it as that"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', "a.json is not JSON: .*; where every line is a row, set format to"),
    ],
)
def test_what_is_no_text_is_refused_with_what_it_is(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_what_another_format_would_read_is_said(tmp_path):
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns("q", "a")}))
    with pytest.raises(
        ValueError, match="talk.jsonl, line 1, has no text in field 'text', but messages: set format to"
    ):
        read(tmp_path / "talk.jsonl")
    (tmp_path / "short.json").write_text('["short"]')
    with pytest.raises(
        ValueError, match="holds no text; of json files only strings of 200 characters or more are read"
    ):
        read(tmp_path / "short.json")


def test_a_setting_that_no_file_heeds_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(ValueError, match="field 'body' has no effect with format text; it is for jsonl"):
        read(tmp_path, field="body")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n')
    assert read(tmp_path, field="body") == ["one", "two"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".x").touch()
    with pytest.raises(ValueError, match=r"holds no file that matches '\*\*/\*' but 1 hidden ones"):
        read(tmp_path / "c")


# --- cleaned ----------------------------------------------------------------------------------------------------


def test_what_holds_no_text_is_left_out_and_counted(tmp_path, said):
    rows = ["one", "", None, " \n", "two"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows) + "null\n")
    parquet.write_table(pyarrow.table({"text": ["three", None, ""]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text(" \n")
    (tmp_path / "d.jsonl").touch()
    assert read(tmp_path) == ["one", "two", "three"]
    assert f"{tmp_path}: 8 without text left out" in said()
    for name in ("a.jsonl", "b.parquet"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="holds no text: all 2 files or rows are empty"):
        read(tmp_path)
    # a row that has another form is no empty one
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(ValueError, match="d.jsonl, line 2, has no text in field 'text'; it has body"):
        read(tmp_path)


def test_conversations_without_an_answer_are_left_out(tmp_path, said):
    good = turns("q", "a")
    empty = [[], None, turns("q", " "), turns("q", "a", "q", ""), [good[0], {"role": "assistant", "content": None}]]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (good, *empty)))
    assert [each.messages for each in read(path, format="chat")] == [good]
    assert said() == [f"{path}: 5 without text left out"]


def test_byte_order_marks_and_line_ends_of_windows_are_taken_off_and_counted(tmp_path, said):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\r\n")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\xef\xbb\xbf{"text": "\\ufeffc"}\r\n')
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(["x" * 250]).encode())
    assert read(tmp_path) == ["one\n\ntwo\rthree", "a\nb", "c", "x" * 250]
    assert said()[1] == f"{tmp_path}: 4 byte order marks taken off, 2 documents with \\r\\n written with \\n"
    # as runs of before go on
    assert read(tmp_path / "a.txt", clean=False) == ["\ufeffone\r\n\r\ntwo\rthree"]
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": turns("q\r\n", "a\r\nb")}))
    (made,) = read(talk, format="chat")
    assert [message["content"] for message in made.messages] == ["q\n", "a\nb"]


# --- cut --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["word " * 1000, "字" * 5000, "a line\n" + "word " * 1000 + "\nanother\n"])
def test_a_long_line_is_cut_by_length(text):
    found = list(pieces(text, 200))
    assert "".join(found) == text
    assert all(200 <= len(piece) <= 410 for piece in found[:-1])
    assert len(found) > 10
    # as runs of before go on
    assert len(list(pieces(text, 200, cut_lines=False))) <= 3


def test_a_source_of_one_long_line_has_documents_to_hold_out(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("word " * 3000)
    assert len(read(path)) == 4
    assert len(read(path, clean=False)) == 1
