"""How a network came about, for the report: commands, machines, stages with their dates, versions, data."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from flextron_lit import checkpoint
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.files.damage import read_rows
from flextron_lit.files.provenance import date, now
from flextron_lit.files.whole_file import write_json
from flextron_lit.latency.device import device_description

INVOCATIONS = "pipeline.json"
"""In the folder of a pipeline: one row for each time that it was started with something left to do."""
INSTANT = 1.0
"""Seconds."""


def note_invocation(folder: Path, *, fresh: bool) -> None:
    """Keep the command of this process, with date and machine, for the report.

    Args:
        folder: of the pipeline.
        fresh: forget those before.
    """
    rows = [] if fresh else invocations(folder)
    rows.append({"command": shlex.join(["python", *sys.argv]), "date": now(), "machine": machine()})
    write_json(folder / INVOCATIONS, rows)


def machine() -> str:
    """The device that training takes by default, and the system."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{device_description(device)['name']}; {platform.system()} {platform.machine()}"


def invocations(folder: Path) -> list[dict[str, str]]:
    """Command, date and machine of each start of a pipeline; none where there was no pipeline."""
    return read_rows(folder / INVOCATIONS)


def stage_rows(history: Sequence[Mapping[str, Any]], stages: Sequence[RunFolder]) -> Iterator[dict[str, Any]]:
    """A row for every stage of a history: what it did, and when, as far as its run folder is there.

    Start and end are the dates of two files that a run writes then; the time between has the pauses of a resumed run
    in it.

    Args:
        history: of the last checkpoint.
        stages: run folders.
    """
    runs = {len(checkpoint.read(run.checkpoint).history) - 1: run for run in stages}
    for index, record in enumerate(history):
        run = runs.get(index)
        yield {
            "stage": record.get("stage", "unknown"),
            "folder": "" if run is None else run.path.name,
            **{name: record.get(name) for name in ("steps", "tokens", "seed", "git_commit")},
            **({} if run is None else _dates(run)),
        }


def _dates(run: RunFolder) -> dict[str, Any]:
    """None where the files say nothing of the run, as in a copy: no run is over in an instant."""
    begun, ended = ((run.path / name).stat().st_mtime for name in ("config.yaml", "status.json"))
    if ended - begun < INSTANT:
        return {}
    return {"started": date(datetime.fromtimestamp(begun)), "seconds": ended - begun}


def data_rows(history: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for every text domain of the last stage that says what it read."""
    data: Mapping[str, Any] = next((record["data"] for record in reversed(history) if record.get("data")), {})
    for name, domain in data.get("domains", {}).items():
        yield {
            "domain": name,
            "source": domain.get("source", ""),
            "weight": domain.get("weight"),
            "tokens": domain.get("tokens", {}),
        }
