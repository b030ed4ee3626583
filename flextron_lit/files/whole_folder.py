"""A folder that is there whole or not at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flextron_lit.files.whole_file import OUT_OF_SPACE


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty sibling to fill, which takes the folder's place at the end; after an error the folder is as before.

    Args:
        folder: what is to be there; an existing one is replaced.
    """
    partial, old = _sibling(folder, "partial"), _sibling(folder, "old")
    try:
        recover(folder)
        # of a process that was killed
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        with suppress(FileNotFoundError):
            os.rename(folder, old)
        os.rename(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            recover(folder)
        raise


def recover(folder: Path) -> None:
    """Finish a replacement that was cut off: bring the old folder back if the new one did not arrive."""
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def write_whole(folder: Path, *, size: int) -> Iterator[Path]:
    """As `whole_folder`, and says what to do where the folder cannot be written.

    Args:
        folder: what is to be there; an existing one is replaced.
        size: room that it needs at least, in bytes.

    Raises:
        ValueError: if it cannot be written, with the reason; nothing is left then.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"cannot write {folder}: a file of that name exists; name another place")
    try:
        with whole_folder(folder) as partial:
            yield partial
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise ValueError(_cannot_write(folder, number, size)) from error


def files_in(folder: Path) -> dict[str, Path]:
    """All files of a folder and of those in it, by their path there, in order."""
    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}


def free_space(path: Path) -> float:
    """Megabytes that are free where a file or folder is to be written."""
    there = next(folder for folder in path.absolute().parents if folder.is_dir())
    return shutil.disk_usage(there).free / 1e6


def _error_number(error: Exception) -> int | None:
    """The system's number of a failed write; safetensors and tokenizers give it in the text alone."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


def _cannot_write(folder: Path, number: int, needed: int) -> str:
    reason = os.strerror(number)
    if number not in OUT_OF_SPACE:
        return f"cannot write {folder} ({reason}); name another place, or mend this one"
    return (
        f"cannot write {folder} ({reason}): it needs about {needed / 1e6:.1f} MB beside what is there, "
        f"but {free_space(folder):.1f} MB are free; make room, or name another place"
    )


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
