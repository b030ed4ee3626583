"""A folder that is there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # only writing needs them, and importing them takes seconds that reading should not cost

    pass


OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


def write_whole(folder: Path, fill: Callable[[Path], None], *, size: int) -> None:
    """Fill a sibling, then rename it into place: a folder is there whole or not at all.

    Args:
        folder: what is to be there; an existing one is replaced.
        fill: writes the sibling that it is given.
        size: room that it needs at least, in bytes.

    Raises:
        ValueError: if it cannot be written, with the reason; nothing is left then.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot write {folder}: a file of that name exists; name another place")
    partial = _sibling(folder, "partial")
    try:
        recover(folder)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        fill(partial)
        _replace(folder, partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            recover(folder)
        number = _error_number(error)
        if number is None:
            raise
        raise ValueError(_cannot_write(folder, number, size)) from error


def recover(folder: Path) -> None:
    """Finish a replacement that was cut off: bring the old folder back if the new one did not arrive."""
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _replace(folder: Path, partial: Path) -> None:
    old = _sibling(folder, "old")
    with suppress(FileNotFoundError):
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _error_number(error: BaseException) -> int | None:
    """The system's number of a failed write; safetensors and tokenizers give it in the text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _cannot_write(folder: Path, number: int, needed: int) -> str:
    reason = os.strerror(number)
    if number not in OUT_OF_SPACE:
        return f"cannot write {folder} ({reason}); name another place, or mend this one"
    disk = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(disk).free
    return (
        f"cannot write {folder} ({reason}): it needs about {needed / 1e6:.1f} MB beside what is there, "
        f"but {free / 1e6:.1f} MB are free; make room, or name another place"
    )


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
