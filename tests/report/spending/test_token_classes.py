import pytest

from flextron_lit.report.spending.token_classes import token_class, token_classes
from flextron_lit.report.spending.token_pieces import Piece


@pytest.mark.parametrize(
    ("text", "before", "expected"),
    [
        (" cat", "a", "word start"),
        ("cat", "", "word start"),
        ("cat", "(", "word start"),
        ("(cat", "f", "word start"),
        ("\n  cat", "x", "word start"),
        ("s", "cat", "word continuation"),
        ("'t", "don", "word continuation"),
        ("’s", "Ada", "word continuation"),
        ("rd", "3", "word continuation"),
        ("кот", " ", "word start"),
        ("ами", "кот", "word continuation"),
        ("世", "界", "word continuation"),
        # a vowel sign is no letter to Python, but part of a word
        ("\u093f", "न", "word continuation"),
        ("\u0301", "e", "word continuation"),
        ("12", "a", "number"),
        (" 3.5%", "", "number"),
        ("٣", "", "number"),
        (".", "a", "punctuation"),
        (" +=", "a", "punctuation"),
        ("€", "", "punctuation"),
        ("🦉", "", "punctuation"),
        ("'", "a", "punctuation"),
        (" ", "a", "whitespace"),
        ("\n\n", "", "whitespace"),
        ("\t", "", "whitespace"),
        ("\u3000", "", "whitespace"),
        ("", "a", "other"),
        ("\u200d", "a", "other"),
        ("\ue000", "", "other"),
    ],
)
def test_the_characters_tell_the_class(text, before, expected):
    assert token_class(text, before) == expected


def test_every_token_has_the_class_of_its_piece():
    pieces = [Piece("a", 0, 1), Piece("世", 1, 4), Piece("<|x|>", 4, 5, special=True), Piece("b", 5, 6)]
    assert token_classes(pieces) == ["word start", *["word continuation"] * 3, "other", "word start"]


def test_a_stretch_does_not_continue_the_one_before():
    assert token_classes([Piece("a", 0, 1), Piece("b", 1, 2)])[1] == "word continuation"
    assert token_classes([Piece("a", 0, 1), Piece("b", 1, 2, cut=True)])[1] == "word start"
