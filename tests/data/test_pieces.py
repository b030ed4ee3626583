import pytest

from flextron_lit.data import TextDomain
from flextron_lit.data.pieces import pieces
from flextron_lit.data.texts import documents


def test_a_text_is_cut_behind_blank_lines():
    paragraphs = [f"{n} " + "word " * 30 + "\n\n" for n in range(20)]
    text = "".join(paragraphs)
    found = list(pieces(text, 300))
    assert "".join(found) == text
    assert len(found) == 10
    assert all(piece.endswith("\n\n") and 300 <= len(piece) < 600 for piece in found)


def test_without_blank_lines_it_is_cut_behind_any():
    text = "one line of words\n" * 100
    found = list(pieces(text, 200))
    assert "".join(found) == text
    assert all(400 <= len(piece) < 420 for piece in found[:-1])
    assert list(pieces("short", 200)) == ["short"]


@pytest.mark.parametrize("name", ["mine.txt", "mine.md"])
def test_a_source_that_is_one_text_file_has_several_documents(tmp_path, name):
    path = tmp_path / name
    path.write_text("\n\n".join(f"{n} " + "word " * 100 for n in range(100)))
    alone = documents(TextDomain(source=str(path)))
    assert len(alone) > 10
    # a folder's files are documents as they are
    assert len(documents(TextDomain(source=str(tmp_path)))) == 1
    assert [" ".join(each.split()) for each in alone] != [" ".join(path.read_text().split())]
    assert " ".join(" ".join(each.split()) for each in alone) == " ".join(path.read_text().split())
