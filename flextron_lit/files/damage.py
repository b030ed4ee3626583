"""Reading what may be damaged: one clear error that names the file, and what to do about it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# a file of another content than expected fails wherever something is looked up in it, converted or made of it
SIGNS = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError, SafetensorError)


@contextmanager
def damage(path: Path, mend: str, *, what: str = "is damaged") -> Iterator[None]:
    """Turn whatever reading a file raises into one error.

    Args:
        path: what is read, for the message.
        mend: what its user can do.
        what: is the matter with it.

    Raises:
        ValueError: instead of what was raised, but for missing permission: then the file may be whole.
    """
    try:
        yield
    except PermissionError:
        # the system's message names it
        raise
    except SIGNS as error:
        raise ValueError(f"{path} {what} ({type(error).__name__}: {error}); {mend}") from error


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A table of names and numbers that `write_json` wrote; empty where there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    if not path.is_file():
        return []
    with damage(path, "restore it, or delete it"):
        return [{name: _numbers(value) for name, value in row.items()} for row in read_json(path)]


def number(value: float | None) -> float:
    """What was written as null, since JSON has no NaN."""
    return math.nan if value is None else value


def _numbers(value: Any) -> Any:
    return {name: number(inner) for name, inner in value.items()} if isinstance(value, dict) else number(value)
