"""Token ids back to text, token by token, without cutting a character in two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What bytes decode to that are no whole character."""


@dataclass(frozen=True)
class Piece:
    """Text of a token, or of neighbouring tokens that hold parts of the same character."""

    text: str
    start: int
    """Its first token."""
    stop: int
    """One past its last token."""
    special: bool = False
    """Whether it is a token that no text holds, such as the end-of-text token."""
    cut: bool = False
    """Whether it begins a stretch of text: what stands before it is from elsewhere."""

    def moved(self, tokens: int) -> Piece:
        """The same behind so many more tokens."""
        return replace(self, start=self.start + tokens, stop=self.stop + tokens)


def pieces_of(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The pieces of a stretch of text; together they are what all ids decode to, special tokens included."""
    return list(_pieces(ids, tokenizer))


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    special = set(tokenizer.all_special_ids)
    # each piece is decoded behind the one before: some tokenizers drop the space in front of what they decode first
    before, start = 0, 0
    for stop in range(1, len(ids) + 1):
        text = _decode(ids[before:stop], tokenizer)[len(_decode(ids[before:start], tokenizer)) :]
        closed = stop == len(ids) or ids[stop - 1] in special or ids[stop] in special
        if text.endswith(UNFINISHED) and not closed:
            continue
        yield Piece(text, start, stop, ids[start] in special, start == 0)
        before, start = start, stop


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text: str = tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    return text
