"""A few classes of tokens that any language and tokenizer has, told by the characters alone (ours)."""

import unicodedata
from collections.abc import Sequence
from typing import Literal, get_args

from flextron_lit.report.spending.token_pieces import Piece

TokenClass = Literal["word start", "word continuation", "number", "punctuation", "whitespace", "other"]
TOKEN_CLASSES: tuple[TokenClass, ...] = get_args(TokenClass)
APOSTROPHES = "'’"

LETTER, DIGIT, SYMBOL, SPACE = range(4)


def token_class(text: str, before: str = "") -> TokenClass:
    """The class of a piece of text.

    A piece with a letter (or a mark, such as a vowel sign) belongs to a word, and continues it if it follows a letter
    or digit directly or behind an apostrophe: `don` + `'t`. Where words are written without spaces nearly all of them
    are continuations. Without a letter, a digit makes it a number, and a sign or symbol punctuation.

    Args:
        text: of the piece, with the space in front of it if it has one.
        before: the text before it; its last character matters.

    Returns:
        `other` for what holds none of these: no text, controls, private characters.
    """
    kinds = {_kind(character) for character in text}
    if LETTER in kinds:
        return "word continuation" if _continues(text, before) else "word start"
    if DIGIT in kinds:
        return "number"
    if SYMBOL in kinds:
        return "punctuation"
    return "whitespace" if kinds == {SPACE} else "other"


def token_classes(pieces: Sequence[Piece]) -> list[TokenClass]:
    """The class of every token: that of its piece; special tokens are `other`."""
    classes: list[TokenClass] = []
    before = ""
    for piece in pieces:
        own: TokenClass = "other" if piece.special else token_class(piece.text, "" if piece.cut else before)
        classes += [own] * (piece.stop - piece.start)
        before = piece.text or before
    return classes


def _continues(text: str, before: str) -> bool:
    first = text.lstrip(APOSTROPHES)[0]
    return _kind(first) in (LETTER, DIGIT) and bool(before) and _kind(before[-1]) in (LETTER, DIGIT)


def _kind(character: str) -> int | None:
    category = unicodedata.category(character)
    if character.isspace():
        return SPACE
    return {"L": LETTER, "M": LETTER, "N": DIGIT, "P": SYMBOL, "S": SYMBOL}.get(category[0])
