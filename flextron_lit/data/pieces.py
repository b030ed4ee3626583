"""One long text as several documents, so that some of it can be held out (ours)."""

from collections.abc import Iterator

CHARACTERS = 4000
"""Least length of a piece: about a thousand tokens, two blocks of training."""


def pieces(text: str, characters: int = CHARACTERS) -> Iterator[str]:
    """Cut a text behind blank lines, or behind any line where there is none for as long again.

    Args:
        text: without line ends it stays whole.
        characters: least length of every piece but the last.
    """
    lines: list[str] = []
    length = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= 2 * characters or (length >= characters and not line.strip()):
            yield "".join(lines)
            lines, length = [], 0
    if lines:
        yield "".join(lines)
