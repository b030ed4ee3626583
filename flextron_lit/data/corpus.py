"""A domain's text as parts that are read where they lie: nothing is fetched, counted or tokenised beforehand."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pyarrow.parquet import read_metadata

from flextron_lit.data.cleaning import Seen, cleaned
from flextron_lit.data.compression import unpacked
from flextron_lit.data.document import Document
from flextron_lit.data.domain import COMPRESSIONS, TextDomain, ending
from flextron_lit.data.formats import row_documents
from flextron_lit.data.loader import permutation
from flextron_lit.data.pieces import pieces_of
from flextron_lit.data.rows import MARK, decode, json_rows, open_dataset, parquet_rows, rows_of
from flextron_lit.data.texts import dataset_source, is_lone_text, local_files, of_file, read, source_of
from flextron_lit.files.digest import sha256_of_json
from flextron_lit.files.ranks import tell

MOST_BYTES, LEAST_BYTES = 2**24, 2**16
"""Of the stretches that a file of lines is read in: a resumed run reads one of them again for each lane."""
PACKED = 3
"""Bytes of text in a byte of a compressed file, about."""
PARTS_OF_A_LANE = 8
"""What cannot be cut is shared so that every lane has about as many: then none is an eighth longer than another."""


@dataclass(frozen=True)
class Part:
    """What a lane reads from its beginning: a stretch of a file, a row group, a shard, or what cannot be cut."""

    name: str
    """What to call it."""
    size: float
    """How much text there is in it, relative to the other parts."""
    open: Callable[[], Iterator[Document]]
    """Its documents as they stand, an empty text where there is none; can go to another process."""
    file: tuple[Path, int] | None = None
    """The file that it is in, and how many bytes that had as the corpus was listed; None where it is in none."""
    share: tuple[int, int] = (0, 1)
    """Where lanes share what is too little to be cut, or cannot be: which document of how many belongs to this one."""

    def documents(self, domain: TextDomain, first: int = 0) -> Iterator[tuple[int, Document]]:
        """Its documents with their numbers, from one on.

        Raises:
            ValueError: if it is not there any more, or not as it was, or cannot be read as its format says.
        """
        index, sharing = self.share
        try:
            if self.file and (found := self.file[0].stat().st_size) != self.file[1]:
                raise ValueError(
                    f"{self.file[0]} changed while it was read: it had {self.file[1]} bytes, now it has {found}; bring "
                    "it back, and the same command resumes, or start anew with --fresh"
                )
            for number, document in islice(enumerate(_clean(self.open(), domain)), first, None):
                if number % sharing == index:
                    yield number, document
        except FileNotFoundError as error:
            raise ValueError(f"{self.name} is not there any more ({error.strerror}); bring it back") from error
        except OSError as error:
            raise ValueError(f"{self.name} cannot be read: {error}") from error


@dataclass(frozen=True)
class Corpus:
    """The text of a domain, however much it is."""

    domain: TextDomain
    parts: list[Part]
    fingerprint: str
    """Digest of what the parts are, by names and sizes: content is not read for it."""
    _dealt: dict[str, list[list[Part]]] = field(default_factory=dict, repr=False, compare=False)

    def dealt(self, lanes: int, name: str) -> list[list[Part]]:
        """The parts of each lane, in the order in which it reads them.

        Args:
            lanes: how many.
            name: another one gives another order, and other parts to each lane.
        """
        if name not in self._dealt:
            # parts of very different sizes would let some lanes come round before others
            ends = [(0.0, lane) for lane in range(lanes)]
            hands: list[list[Part]] = [[] for _ in range(lanes)]
            for index in permutation(len(self.parts), name):
                end, lane = heapq.heappop(ends)
                hands[lane].append(self.parts[index])
                heapq.heappush(ends, (end + self.parts[index].size / self.parts[index].share[1], lane))
            # two rounds at a time: lanes come round one after the other
            for old in list(self._dealt)[:-1]:
                del self._dealt[old]
            self._dealt[name] = hands
        return self._dealt[name]


def corpus(domain: TextDomain, lanes: int) -> Corpus:
    """The parts of a domain.

    Args:
        domain: where its text is and how it is read.
        lanes: how many will read it side by side.

    Raises:
        ValueError: if there is none, it cannot be read as its format says, or a setting has no effect.
    """
    found = list(_parts(domain, lanes))
    if next((True for part in found for _ in part.documents(domain)), None) is None:
        raise ValueError(f"{domain.source} (files {domain.files!r}) holds no text")
    sharing = min(lanes, -(-PARTS_OF_A_LANE * lanes // len(found)))
    parts = [replace(part, share=(i, sharing)) for part in found for i in range(sharing)]
    return Corpus(domain, parts, sha256_of_json([[part.name, part.size] for part in found]))


def _parts(domain: TextDomain, lanes: int) -> Iterator[Part]:
    """Parts as they lie there."""
    scheme = domain.source.partition(":")[0]
    if domain.format == "dataset":
        yield from _shards(domain)
        return
    if scheme in ("python", "generated") or source_of(domain).scheme == "pypi":
        yield Part(domain.source, 1, partial(read, domain, Seen()))
        return
    seen = Seen()
    paths = local_files(source_of(domain), domain, seen)
    for path in paths:
        seen.files[domain.format_of(path.name), ending(path.name)] += 1
    domain.refuse_unused(seen.formats)
    for line in seen.told(domain):
        tell(f"{domain.source}: {line}")
    sizes = [path.stat().st_size for path in paths]
    most = min(MOST_BYTES, max(LEAST_BYTES, sum(sizes) // (PARTS_OF_A_LANE * lanes)))
    for path, size in zip(paths, sizes, strict=True):
        yield from (replace(part, file=(path, size)) for part in _of_file(path, size, most, domain))


def _of_file(path: Path, size: int, most: int, domain: TextDomain) -> Iterator[Part]:
    form, alone = domain.format_of(path.name), is_lone_text(domain)
    if form == "parquet":
        yield from _row_groups(path, domain)
    elif form in ("jsonl", "chat") or alone:
        lines = _stretch_of_text if alone else _stretch_of_rows
        if path.suffix.lower() in COMPRESSIONS:
            yield Part(str(path), PACKED * size, partial(lines, path, 0, math.inf, domain))
            return
        for start in range(0, size, most):
            name = f"{path}, bytes {start} to {min(size, start + most)}"
            yield Part(name, min(most, size - start), partial(lines, path, start, start + most, domain))
    else:
        # a document by itself
        yield Part(str(path), size, partial(_whole, path, domain))


def _whole(path: Path, domain: TextDomain) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from of_file(str(path), file, domain, Seen())


def _stretch(path: Path, start: int, stop: float) -> Iterator[tuple[str, bytes]]:
    """The lines that begin in a stretch of a file; what is compressed is one stretch."""
    with path.open("rb") as packed, unpacked(path.name, packed) as file:
        at = start
        if start:
            file.seek(start - 1)
            at += len(file.readline()) - 1
        while at < stop and (line := file.readline()):
            yield f"{path}, byte {at},", line
            at += len(line)


def _stretch_of_rows(path: Path, start: int, stop: float, domain: TextDomain) -> Iterator[Document]:
    return row_documents(json_rows(_stretch(path, start, stop)), domain)


def _stretch_of_text(path: Path, start: int, stop: float, domain: TextDomain) -> Iterator[Document]:
    """The pieces of a long text; where one stretch ends and the next begins, a piece ends as well."""
    return pieces_of(_lines_of_text(path, start, stop, domain), cut_lines=domain.clean)


def _lines_of_text(path: Path, start: int, stop: float, domain: TextDomain) -> Iterator[str]:
    for place, line in _stretch(path, start, stop):
        text = decode(place, line)
        if domain.clean:
            text = (text if start else text.removeprefix(MARK)).replace("\r\n", "\n")
        yield from text.splitlines(keepends=True)


def _row_groups(path: Path, domain: TextDomain) -> Iterator[Part]:
    try:
        metadata = read_metadata(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not parquet, or damaged: {error}") from error
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).total_byte_size
        yield Part(f"{path}, row group {group}", size, partial(_row_group, path, group, domain))


def _row_group(path: Path, group: int, domain: TextDomain) -> Iterator[Document]:
    with path.open("rb") as file:
        yield from row_documents(parquet_rows(str(path), file, domain.field_name, group), domain)


def _shards(domain: TextDomain) -> Iterator[Part]:
    """A data set in the shards that `datasets` reads one after the other: files, or their row groups."""
    source = dataset_source(domain)
    data = open_dataset(source, domain, streaming=True)
    name = f"{source.location}, split {domain.split}"
    for index in range(data.num_shards):
        yield Part(f"{name}, shard {index} of {data.num_shards}", 1, partial(_shard, data, index, name, domain))


def _shard(data: Any, index: int, name: str, domain: TextDomain) -> Iterator[Document]:
    rows = rows_of(data.shard(data.num_shards, index), f"{name}, shard {index}", domain.field_name)
    return row_documents(rows, domain)


def _clean(documents: Iterable[Document], domain: TextDomain) -> Iterator[Document]:
    """As `texts.read` has them."""
    for raw in documents:
        document = cleaned(raw, Seen()) if domain.clean else raw
        if not isinstance(document, str):
            yield document
        elif text := document.strip():
            yield text
