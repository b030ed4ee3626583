"""What is no part of a text is left out of it, and said in one line."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import PurePath

from flextron_lit.data.document import Document
from flextron_lit.data.domain import ENDINGS, Format, TextDomain
from flextron_lit.data.rows import MARK

PLAIN = (".txt", ".text", ".md")
"""Ends of names of plain text that nobody need be told of."""


@dataclass
class Seen:
    """What reading came across: how many of each."""

    files: Counter[tuple[Format, str]] = field(default_factory=Counter)
    """By what they are read as, and the end of their name."""
    hidden: int = 0
    """Files left out."""
    empty: int = 0
    """Files, rows and conversations without text."""
    marks: int = 0
    """Byte order marks."""
    line_ends: int = 0
    """Documents with line ends of Windows."""

    @property
    def formats(self) -> list[Format]:
        """What files are read as."""
        return list(dict.fromkeys(form for form, _ in self.files))

    def told(self, domain: TextDomain) -> Iterator[str]:
        """What there is to say of it."""
        unknown = sorted({end for form, end in self.files if form == "text" and end not in PLAIN})
        if domain.format is None and (unknown or self.formats not in ([], ["text"])):
            counts: Counter[Format] = Counter()
            for (form, _), count in self.files.items():
                counts[form] += count
            read = ", ".join(f"{count} file{'s' * (count > 1)} as {form}" for form, count in sorted(counts.items()))
            ends = ", ".join(end or "no end" for end in unknown)
            known = f" ({ends}: none of {', '.join(ENDINGS)}, so plain text; set format if not)" if unknown else ""
            yield f"read by the ends of their names: {read}{known}"
        changes = {
            "without text left out": self.empty,
            "hidden files left out": self.hidden,
            "byte order marks taken off": self.marks,
            "documents with \\r\\n written with \\n": self.line_ends,
        }
        changed = ", ".join(f"{count} {what}" for what, count in changes.items() if count)
        if changed:
            yield changed


def is_hidden(path: PurePath, pattern: str) -> bool:
    """Whether a file, or a folder around it, is hidden, and the pattern does not name hidden ones itself.

    Args:
        path: relative to the source.
        pattern: which files are asked for.
    """
    return _dotted(path) and not _dotted(PurePath(pattern))


def _dotted(path: PurePath) -> bool:
    return any(part.startswith(".") for part in path.parts)


def cleaned(document: Document, seen: Seen) -> Document:
    """A document without byte order mark, and with plain line ends."""
    if isinstance(document, str):
        return _plain(document, seen)
    messages = [message | {"content": _plain(message["content"], seen)} for message in document.messages]
    return replace(document, messages=messages)


def _plain(text: str, seen: Seen) -> str:
    seen.marks += text.startswith(MARK)
    seen.line_ends += "\r\n" in text
    return text.removeprefix(MARK).replace("\r\n", "\n")
