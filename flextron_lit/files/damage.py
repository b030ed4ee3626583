"""Reading what may be damaged: one clear error that names the file, and what to do about it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

# a file of another content than expected fails wherever something is looked up in it, converted or made of it
SIGNS = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError, MemoryError),
    *(SafetensorError, yaml.YAMLError),
)
SHOWN = 300
"""Characters of what was raised: of libraries it may be a page."""


class DamageError(ValueError):
    """A file is not as it was written; which, and what its user can do, is said."""


@contextmanager
def damage(
    path: Path, mend: str, *, what: str = "is damaged", signs: tuple[type[Exception], ...] = SIGNS
) -> Iterator[None]:
    """Turn whatever reading a file raises into one error, on one line.

    Args:
        path: what is read, for the message.
        mend: what its user can do.
        what: is the matter with it.
        signs: errors that say so; `Exception` where another library reads it.

    Raises:
        DamageError: instead of what was raised, but for one of another file that was read meanwhile, and for missing
            permission: then the file may be whole.
    """
    try:
        yield
    except (PermissionError, DamageError):
        # the system's message names it
        raise
    except signs as error:
        said = " ".join(str(error).split())[:SHOWN]
        raise DamageError(f"{path} {what} ({type(error).__name__}: {said}); {mend}") from error


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        ValueError: if it is no JSON, or holds numbers or characters that are none.
    """
    text = path.read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    if r"\ud" in text.lower():
        # half of a character, that nothing can write
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _finite(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise ValueError(f"{digits} is no number that a float holds")
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A table of names and numbers that `write_json` wrote; empty where there is none.

    Raises:
        ValueError: if the file is damaged.
    """
    if not path.exists():
        return []
    with damage(path, "restore it, or delete it"):
        return [{name: _numbers(value) for name, value in row.items()} for row in read_json(path)]


def number(value: float | None) -> float:
    """What was written as null, since JSON has no NaN."""
    return math.nan if value is None else value


def _numbers(value: Any) -> Any:
    return {name: number(inner) for name, inner in value.items()} if isinstance(value, dict) else number(value)
