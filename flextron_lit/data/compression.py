"""Files that are unpacked as they are read."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import IO, Any

import pyarrow

# pyarrow comes with zstd, which this Python does not
UNPACKED_BY: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file: io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd")),
}
"""Unpacked content of a file that is open for reading, by the end of its name."""


@contextmanager
def unpacked(name: str, file: IO[bytes]) -> Iterator[IO[bytes]]:
    """The content of a file, for reading forwards.

    Args:
        name: its name; the end says whether it is compressed, and how.
        file: open for reading.

    Raises:
        ValueError: if it is damaged or not compressed in that way, whenever that shows.
    """
    unpack = UNPACKED_BY.get(PurePath(name).suffix.lower())
    if unpack is None:
        yield file
        return
    try:
        with unpack(file) as content:
            yield content
    except (EOFError, OSError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} is damaged, or not what the end of its name says: {reason}") from error
