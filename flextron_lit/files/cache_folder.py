"""The cache folder: entries appear whole or not at all, and two processes do not make the same one twice."""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from flextron_lit.files.ranks import tell
from flextron_lit.files.whole_file import named
from flextron_lit.files.whole_folder import whole_folder

T = TypeVar("T")


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
            with named(folder), whole_folder(folder) as partial:
                make(partial)
    return folder


def intact(kind: str, key: str, make: Callable[[Path], None], read: Callable[[Path], T | None]) -> T | None:
    """What can be read from a cached folder, which is made a second time where it is damaged.

    Args:
        kind: as in `cached_folder`.
        key: as in `cached_folder`.
        make: as in `cached_folder`.
        read: what the folder holds; None if it is damaged.

    Returns:
        What was read; None if even the second one is damaged.

    Raises:
        ValueError: as `cached_folder`.
    """
    for _ in range(2):
        folder = cached_folder(kind, key, make)
        found = read(folder)
        if found is not None:
            return found
        tell(f"{folder} is damaged; making it again")
        drop(folder, unless=lambda entry: read(entry) is not None)
    return None


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
