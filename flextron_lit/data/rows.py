"""Files and data sets of rows: each row with its place, for errors. Nothing is held but the rows at hand."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
from pyarrow.parquet import ParquetFile

from flextron_lit.data.domain import TextDomain
from flextron_lit.files.cache_folder import cache_root
from flextron_lit.files.digest import sha256_of_json
from flextron_lit.files.whole_folder import files_in
from flextron_lit.sources import Source

Row = tuple[str, Any]
"""Its place, and what was read there."""
ROWS = 1024
"""Read at once of a parquet file or data set."""
MOST_SHARDS = 1024
"""Of a data set that was saved, which could be cut anywhere."""
BUFFER = 2**20
"""Bytes of a parquet file's column that are held."""
MARK = "\ufeff"
"""The byte order mark, with which some programs begin a file of UTF-8."""
KINDS = {
    b"\x1f\x8b": "it is compressed with gzip; let its name end in .gz",
    b"BZh": "it is compressed with bzip2; let its name end in .bz2",
    b"\xfd7zXZ": "it is compressed with xz; let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "it is compressed with zstd; let its name end in .zst",
    b"\x04\x22\x4d\x18": "it is compressed with lz4; unpack it",
    b"PK\x03\x04": "it is a zip archive; unpack it",
    b"7z\xbc\xaf": "it is a 7z archive; unpack it",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
    b"PAR1": "it is parquet; set format to parquet, or let its name end in .parquet",
    b"%PDF": "it is a PDF; take the text out of it",
    b"\xff\xff\xff\xff": "it looks like Arrow; read the folder of a saved data set with format dataset",
}
"""How files begin that are no text, and what to do about it."""


def json_rows(lines: Iterable[tuple[str, bytes]]) -> Iterator[Row]:
    """The lines of a jsonl file that are not blank, each given with its place.

    Raises:
        ValueError: naming the line that is not UTF-8 or not JSON.
    """
    # a file's own lines end at \n alone: JSON strings may hold U+2028 and its like as they are
    for place, line in lines:
        if line.strip():
            yield place, load_json(place, decode(place, line))


def parquet_rows(name: str, file: IO[bytes], field: str, group: int | None = None) -> Iterator[Row]:
    """The rows of a parquet file, one row group after the other, of which the one column is read.

    Args:
        name: what to call it.
        file: open for reading, seekable.
        field: the column.
        group: read this row group alone.

    Raises:
        ValueError: if it is not parquet, damaged, or lacks the column; naming the columns.
    """
    try:
        # a buffer, so that a large row group is not held whole
        parquet = ParquetFile(file, buffer_size=BUFFER, page_checksum_verification=True)
        _check_column(name, field, parquet.schema_arrow.names)
        first = sum(parquet.metadata.row_group(i).num_rows for i in range(group or 0))
        groups = None if group is None else [group]
        batches = parquet.iter_batches(batch_size=ROWS, columns=[field], row_groups=groups)
        yield from _column_rows(name, field, (batch.column(0).to_pylist() for batch in batches), first)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name} is not parquet, or damaged: {error}") from error


def dataset_rows(source: Source, domain: TextDomain) -> Iterator[Row]:
    """The rows of one split of a Hugging Face data set, of which the one column is read.

    Raises:
        ValueError: if it cannot be read, or lacks the configuration, split or column; naming those it has.
    """
    return rows_of(open_dataset(source, domain), f"{source.location}, split {domain.split}", domain.field_name)


def rows_of(data: Any, name: str, field: str) -> Iterator[Row]:
    """The rows of a Dataset or IterableDataset, of which the one column is read.

    Raises:
        ValueError: if it cannot be read, or lacks the column; naming those it has.
    """
    try:
        # of rows that are read as they come the columns are known from the first
        _check_column(name, field, data.column_names or list(next(iter(data.iter(1)), {})))
        batches = data.select_columns([field]).iter(batch_size=ROWS)
        yield from _column_rows(name, field, (batch[field] for batch in batches))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{name} is damaged, or cannot be fetched: {error}") from error


def decode(place: str, content: bytes) -> str:
    """UTF-8 to text.

    Raises:
        ValueError: naming the byte that is not UTF-8 text, and what it is instead where that can be seen.
    """
    try:
        text, wrong = content.decode("utf-8"), content.find(0)
    except UnicodeDecodeError as error:
        text, wrong = "", error.start
    if wrong < 0:
        return text
    kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), None)
    if kind is None:
        remedy = "it is binary, take it out" if 0 in content else "save it as that"
        kind = f"byte {wrong} is 0x{content[wrong]:02x}; {remedy}"
    raise ValueError(f"{place} is not UTF-8 text: {kind}")


def load_json(place: str, text: str) -> Any:
    """JSON to Python.

    Raises:
        ValueError: naming where it is not JSON.
    """
    try:
        return json.loads(text.removeprefix(MARK))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error


def _column_rows(name: str, field: str, batches: Iterator[list[Any]], number: int = 0) -> Iterator[Row]:
    for batch in batches:
        for value in batch:
            # as pandas and datasets count, to look it up there
            yield f"{name}, row {number} (from 0),", {field: value}
            number += 1


def _check_column(name: str, field: str, columns: list[str]) -> None:
    if field not in columns:
        raise ValueError(f"{name} has no column {field!r}; it has {', '.join(columns) or 'none'}: set field")


def open_dataset(source: Source, domain: TextDomain, *, streaming: bool = False) -> Any:
    """One split of a Hugging Face data set.

    Args:
        source: where it is.
        domain: which configuration and split of it.
        streaming: read it as it comes, shard by shard, in place of fetching it whole.

    Raises:
        ValueError: if it cannot be read, or has no such configuration or split; naming those it has.
    """
    found = _load_dataset(source, domain, streaming)
    if isinstance(found, dict):
        if domain.split not in found:
            raise ValueError(f"{source.location} has no split {domain.split!r}; it has {', '.join(found)}: set split")
        found = found[domain.split]
        return _in_shards(found) if streaming else found
    if domain.split != TextDomain.split:
        raise ValueError(f"split {domain.split!r} has no effect: {source.location} was saved as one; leave it out")
    return _in_shards(found) if streaming else found


def _in_shards(data: Any) -> Any:
    """The same to be read shard by shard, in as many as it has: one for each file, or row group of parquet."""
    if hasattr(data, "to_iterable_dataset"):
        # what lies on the disk as Arrow
        return data.to_iterable_dataset(num_shards=max(1, min(MOST_SHARDS, len(data) // ROWS)))
    return data.reshard()


def _load_dataset(source: Source, domain: TextDomain, streaming: bool) -> Any:
    """A DatasetDict, or a Dataset that was saved on its own."""
    try:
        # a second and a hundred modules: only where a data set is read
        import datasets
    except ImportError as error:
        raise ValueError(f"format dataset needs the package datasets ({error}): pip install datasets") from error

    # a bar on a terminal only, as everywhere here
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(source.location)
    saved = source.scheme == "local" and any((path / n).is_file() for n in ("dataset_dict.json", "state.json"))
    if saved and domain.subset is not None:
        raise ValueError(f"subset {domain.subset!r} has no effect: {path} was saved as one; leave it out")
    try:
        if saved:
            return datasets.load_from_disk(source.location)
        cache = cache_root() / "datasets" / (_state_of(path) if source.scheme == "local" else "")
        how: dict[str, Any] = {"streaming": True} if streaming else {"cache_dir": str(cache)}
        return datasets.load_dataset(source.location, domain.subset, revision=source.revision, **how)
    except Exception as error:
        # no network, no such data set or configuration, damaged files: each its own type, all the user's to mend
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot read a data set from {source.location} (subset {domain.subset or 'not set'}): "
            f"{type(error).__name__}: {reason}"
        ) from error


def _state_of(folder: Path) -> str:
    """Digest of which files a folder holds and when they were written."""
    # datasets goes by the name of a configuration alone, and would read an old copy of files that have changed since
    files = files_in(folder).values()
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return sha256_of_json(states)
