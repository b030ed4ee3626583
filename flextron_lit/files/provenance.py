"""With what a result was made."""

import platform
import subprocess
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "lightning", "transformers", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def now() -> str:
    """Date and time, with the time zone."""
    return date(datetime.now())


def date(moment: datetime) -> str:
    """A moment for people, to the minute."""
    return moment.astimezone().isoformat(sep=" ", timespec="minutes")


def git_commit() -> str | None:
    """Commit of this project, `-dirty` if files changed since; None outside a checkout."""
    here = Path(__file__).parent
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
