"""How a network came about, for the report: commands, machines, stages with their dates, versions, data."""

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
from flextron_lit.files.damage import damage, read_rows
from flextron_lit.files.provenance import date, now
from flextron_lit.files.whole_file import write_json
from flextron_lit.latency.device import device_description
from flextron_lit.terminal.console import duration

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
    path = folder / INVOCATIONS
    with damage(path, "restore it, or delete it"):
        return [{name: str(row[name]) for name in ("command", "date", "machine")} for row in read_rows(path)]


def stage_cells(history: Sequence[Mapping[str, Any]], stages: Sequence[RunFolder]) -> Iterator[list[str]]:
    """Stage, run folder, steps, tokens, seed, start, duration and git commit of every stage of a history.

    When it ran is known where its run folder is there: start and end are the dates of two files that a run writes then,
    so the time between has the pauses of a resumed run in it.

    Args:
        history: of the last checkpoint.
        stages: run folders.
    """
    runs = {len(checkpoint.read(run.checkpoint).history) - 1: run for run in stages}
    for index, record in enumerate(history):
        run = runs.get(index)
        folder, times = ("", ["", ""]) if run is None else (run.path.name, _times(run))
        counts = ["" if record.get(name) is None else f"{record[name]:,}" for name in ("steps", "tokens")]
        seed = "" if record.get("seed") is None else str(record["seed"])
        commit = record.get("git_commit") or ""
        short = commit[:10] + "-dirty" * commit.endswith("-dirty")
        yield [record.get("stage", "unknown"), folder, *counts, seed, *times, short]


def _times(run: RunFolder) -> list[str]:
    """Start and duration; empty where the files say nothing of the run, as in a copy: no run is over in an instant."""
    begun, ended = ((run.path / name).stat().st_mtime for name in ("config.yaml", "status.json"))
    if ended - begun < INSTANT:
        return ["", ""]
    return [date(datetime.fromtimestamp(begun)), duration(ended - begun)]


def domain_cells(history: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Name, source, weight and tokens of every text domain of the last stage that says what it read."""
    data: Mapping[str, Any] = next((record["data"] for record in reversed(history) if record.get("data")), {})
    for name, domain in data.get("domains", {}).items():
        weight = "" if domain.get("weight") is None else f"{domain['weight']:g}"
        tokens = ", ".join(f"{count:,} {split}" for split, count in domain.get("tokens", {}).items())
        yield [name, domain.get("source", ""), weight, tokens]
