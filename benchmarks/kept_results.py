"""Results that are written down as they come: what a file has is not measured again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from flextron_lit.files.cache_folder import cache_root
from flextron_lit.files.provenance import versions
from flextron_lit.files.whole_file import write_json
from flextron_lit.latency.device import device_description


def about() -> dict[str, Any]:
    """Where something was measured, and with what."""
    return {"machine": device_description(torch.device("cpu"))["name"], "versions": versions()}


class Kept:
    """A file of results by kind and name, which several processes may add to.

    Args:
        path: the file.
        settings: that all of it was measured by; None where names say so.

    Raises:
        SystemExit: if the file has other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None = None) -> None:
        self.path = path
        # as they are read back
        wanted = json.loads(json.dumps(settings))
        self.kept: dict[str, Any] = {} if settings is None else {"settings": wanted}
        self.read()
        if self.kept.get("settings") != wanted:
            sys.exit(f"{path} was measured with {self.kept.get('settings')}, not {wanted}: move it away to start anew")

    def read(self) -> None:
        """What is known, by other processes too."""
        if self.path.is_file():
            self.kept = json.loads(self.path.read_text())

    def keep(self, kind: str, name: str, make: Callable[[], Any]) -> Any:
        """What is known, or is made now and written down at once."""
        self.read()
        if name not in self.kept.get(kind, {}):
            self.write(kind, name, make())
        return self.kept[kind][name]

    def write(self, kind: str, name: str, made: Any) -> None:
        """Add to it, or replace what it has."""
        # not beside the results, which are committed
        with FileLock(cache_root() / f"{self.path.name}.lock"):
            self.read()
            self.kept.setdefault(kind, {})[name] = made
            write_json(self.path, self.kept | {"about": about()})
