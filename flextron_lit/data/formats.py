"""File contents to documents."""

from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from typing import IO, Any

from flextron_lit.data.document import Document, conversation_in, encodable, text_in
from flextron_lit.data.domain import TextDomain
from flextron_lit.data.rows import Row, decode, json_rows, load_json, parquet_rows


def documents_in(name: str, file: IO[bytes], domain: TextDomain) -> Iterator[Document]:
    """The documents of one file; an empty text stands for a file, row or conversation that holds none.

    Args:
        name: what to call the file in errors.
        file: open for reading; seekable for parquet.
        domain: says how to read it.

    Raises:
        ValueError: if the file is not UTF-8, not of its format, or lacks the field; naming file and place.
    """
    form = domain.format_of(name)
    if form in ("jsonl", "chat"):
        places = ((f"{name}, line {number},", line) for number, line in enumerate(file, 1))
        yield from row_documents(json_rows(places), domain)
    elif form == "parquet":
        yield from row_documents(parquet_rows(name, file, domain.field_name), domain)
    elif form == "json":
        content = decode(name, file.read())
        found = [_without_tags(s) for s in _strings(_one_json(name, content)) if len(s) >= domain.min_characters]
        # a file of short strings is left out as they are
        if found:
            yield encodable(name, "\n\n".join(found))
    else:
        yield decode(name, file.read())


def row_documents(rows: Iterable[Row], domain: TextDomain) -> Iterator[Document]:
    """A document a row; an empty text where there is no row, or it holds none.

    Raises:
        ValueError: if a row is not as it must be; naming it.
    """
    read = conversation_in if domain.format == "chat" else text_in
    place = None
    for place, row in rows:
        yield read(place, row, domain.field_name)
    if place is None:
        yield ""


def _one_json(name: str, content: str) -> Any:
    try:
        return load_json(name, content)
    except ValueError as error:
        raise ValueError(f"{error}; where every line is a row, set format to jsonl") from error


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
