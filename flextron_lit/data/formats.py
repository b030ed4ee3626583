"""File contents to documents: pure functions of bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

from flextron_lit.data.domain import TextDomain


def documents_in(name: str, content: bytes, domain: TextDomain) -> Iterator[str]:
    """The documents of one file.

    Args:
        name: what to call the file in errors.
        content: its bytes.
        domain: says how to read it.

    Raises:
        ValueError: if the file is empty, not UTF-8, not of its format, or lacks the field; naming file and place.
    """
    text = decode(name, content)
    if domain.format == "jsonl":
        yield from _lines(name, text, domain.field)
    elif domain.format == "json":
        found = [_without_tags(s) for s in _strings(_load(name, text)) if len(s) >= domain.min_characters]
        # a file of short strings is left out as they are
        if found:
            yield _checked(name, "\n\n".join(found))
    else:
        yield _checked(name, text)


def decode(name: str, content: bytes) -> str:
    """UTF-8 to text.

    Raises:
        ValueError: naming the byte that is not UTF-8.
    """
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is 0x{content[error.start]:02x}") from error


def _checked(name: str, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{name} holds no text; take it out")
    try:
        # JSON can spell half of a surrogate pair, which no tokenizer takes
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds U+{ord(text[error.start]):04X}, half of a surrogate pair: no text") from error
    return text


def _load(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error


def _lines(name: str, text: str, field: str) -> Iterator[str]:
    # not splitlines: JSON strings may hold U+2028 and its like as they are
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        row = _load(f"{name}, line {number},", line)
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            have = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
            raise ValueError(f"{name}, line {number}, has no text in field {field!r}; it has {have}")
        yield _checked(f"{name}, line {number},", row[field])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("p", "br", "li", "tr", "div"):
            self.parts.append("\n")


def _without_tags(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts).strip()
