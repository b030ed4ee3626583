"""One long text as several documents, so that some of it can be held out (ours)."""

from collections.abc import Iterable, Iterator

CHARACTERS = 4000
"""Least length of a piece: about a thousand tokens, two blocks of training."""


def pieces(text: str, characters: int = CHARACTERS, *, cut_lines: bool = True) -> Iterator[str]:
    """Cut a text behind blank lines, or behind any line where there is none for as long again.

    Args:
        text: put together again, the pieces are what it was.
        characters: least length of every piece but the last.
        cut_lines: cut a line that is twice as long or longer too, behind a blank if it has one there; False leaves
            every line whole.
    """
    return pieces_of(text.splitlines(keepends=True), characters, cut_lines=cut_lines)


def pieces_of(given: Iterable[str], characters: int = CHARACTERS, *, cut_lines: bool = True) -> Iterator[str]:
    """The same of a text's lines, of which no more are held than a piece has."""
    lines: list[str] = []
    length = 0
    for line in given:
        for part in _parts(line, characters) if cut_lines else (line,):
            lines.append(part)
            length += len(part)
            cut = len(part) < len(line)
            if length >= 2 * characters or (length >= characters and (cut or not part.strip())):
                yield "".join(lines)
                lines, length = [], 0
    if lines:
        yield "".join(lines)


def _parts(line: str, characters: int) -> Iterator[str]:
    """A line of twice so many characters or more in parts of about as many, without copying its rest each time."""
    start = 0
    while len(line) >= 2 * characters and len(line) - start > characters:
        blank = line.find(" ", start + characters, start + 2 * characters)
        end = blank + 1 or start + characters
        yield line[start:end]
        start = end
    yield line[start:]
