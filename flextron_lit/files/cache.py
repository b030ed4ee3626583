"""The cache folder: entries appear whole or not at all, and two processes do not make the same one twice."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """`$FLEXTRON_CACHE`, or `~/.cache/flextron_lit`."""
    return Path(os.environ.get("FLEXTRON_CACHE") or "~/.cache/flextron_lit").expanduser()


def cached_folder(kind: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `<root>/<kind>/<key>`, made once.

    Args:
        kind: sort of entry.
        key: what the entry depends on.
        make: fills an empty folder; what it leaves when it raises or is killed is never taken for complete.

    Raises:
        ValueError: if the cache cannot be written.
    """
    folder = cache_root() / kind / key
    with _lock(folder):
        if not folder.is_dir():
            partial = folder.with_name(f"{key}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                make(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            os.rename(partial, folder)
    return folder


def drop(folder: Path, *, unless: Callable[[Path], bool]) -> None:
    """Remove a damaged entry, so that the next use makes it anew.

    Args:
        folder: the entry.
        unless: whether it is intact; asked again here, since another process may have mended it in the meantime.
    """
    with _lock(folder):
        if not unless(folder):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = folder.with_name(f"{folder.name}.lock").open("w")
    except OSError as error:
        raise ValueError(f"cannot write to the cache {cache_root()} ({error}); set FLEXTRON_CACHE") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
