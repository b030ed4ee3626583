"""Files that are there whole or not at all."""

import csv
import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


def is_full(error: BaseException | None) -> bool:
    """Whether an error is that of a full disk."""
    return isinstance(error, OSError) and error.errno in OUT_OF_SPACE


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let the error of a full disk say what was written: the system's own names a file only as it is opened."""
    try:
        yield
    except OSError as error:
        if is_full(error) and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A sibling to write to, which takes the file's place at the end; after an error the file is as it was before.

    Args:
        path: the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with named(path):
            yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """UTF-8, whole."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def json_text(content: Any, *, indent: int | None = 1) -> str:
    """JSON that people can read; a number that is none, such as the loss of no token, is null: JSON has no NaN.

    Args:
        content: what JSON can hold, but for such numbers.
        indent: of each level; None writes one line.
    """
    return json.dumps(finite(content), indent=indent, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same with None for each number that is infinite or none, however deep."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, content: Any) -> None:
    """JSON that people can read, whole."""
    write_text(path, json_text(content))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Comma-separated values, whole: a column for every name that a row has; where another lacks it, it is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def write_page(path: Path, html: str) -> None:
    """Write a page, whole or not at all.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        write_text(path, html)
    except OSError as error:
        raise ValueError(f"cannot write {path} ({error}); name another file with --output") from error
