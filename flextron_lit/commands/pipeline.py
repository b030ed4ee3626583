"""All stages of a config in turn, each in a run folder of its own, each from the checkpoint of the one before."""

import gc
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import Path_fr, register_type
from rich.table import Table

from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.commands.fit import FRESH_HELP, StageCLI, one_line
from flextron_lit.data.domain import domains_of
from flextron_lit.files.ranks import is_first
from flextron_lit.files.whole_folder import free_space
from flextron_lit.report.assembly import report_pipeline
from flextron_lit.report.origin import note_invocation
from flextron_lit.report.summary import summarise
from flextron_lit.terminal.console import about, duration, show, table


class Settings:
    """What a stage's `fit` is told beside its config files, as it is written: only `fit` makes objects of it.

    Args:
        rows: as in a config file.

    Raises:
        ValueError: if they are no mapping.
    """

    # no dataclass: the parser would look for its fields among the rows
    def __init__(self, rows: dict[str, Any]) -> None:
        if not isinstance(rows, dict):
            raise ValueError(f"settings are a mapping, as a config file is, not {rows!r}")
        self.rows = rows


LAUNCHED = "LOCAL_RANK"
"""What Lightning's own launcher notes in the environment."""
register_type(Settings, serializer=lambda settings: settings.rows, deserializer=Settings)


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """One stage: what `fit` would be given."""

    configs: list[Path_fr]
    """Config files, later ones winning; paths are relative to the pipeline's own file."""
    settings: Settings = field(default_factory=lambda: Settings({}))
    """Settings on top of the files."""
    quick: Settings = field(default_factory=lambda: Settings({}))
    """Settings on top of those in a quick run."""
    minutes: float | None = None
    """How long it takes on the machine that the config was written for; shown before the run."""
    quick_minutes: float | None = None
    """The same of a quick run."""


def run(
    stages: dict[str, PipelineStage],
    run_folder: Path = Path("runs/pipeline"),
    disk_gb: float = 0.0,
    quick: bool = False,
    fresh: bool = False,
    checkpoint: str | None = None,
    text: Sequence[str] = (),
) -> None:
    """Run all stages in turn; the same command picks up at the first unfinished one. Ends with a table and a web page.

    Args:
        stages: the stages by name, in order; each writes to the folder of its name in `run_folder`.
        run_folder: everything the pipeline writes; a quick run adds `-quick` to the name.
        disk_gb: gigabytes that the run folder needs at most; with less free, the run does not start.
        quick: a first look: fewer steps and fewer measurements, where the config says which.
        fresh: delete what the run folders hold and start anew.
        checkpoint: what the first stage starts from, in place of the config's: a local folder, or any source.
        text: files, folders or sources of text in place of the config's domains; each is a domain of its own. Files
            are read as the ends of their names say: `.jsonl`, `.ndjson`, `.json`, `.parquet`, else plain text.

    Raises:
        ValueError: if there is no stage, too little room on the disk, two texts of one name, or another process there.
    """
    if not stages:
        raise ValueError("the pipeline lists no stages")
    if quick and not any(stage.quick.rows for stage in stages.values()):
        raise ValueError("--quick has no effect on this pipeline: none of its stages has `quick` settings")
    place = run_folder.with_name(f"{run_folder.name}-quick") if quick else run_folder
    folders = {name: RunFolder(place / name) for name in stages}
    replaced = {"data": {"init_args": {"domains": domains_of(text)}}} if text else {}
    unfinished = fresh or any(folder.status != "finished" for folder in folders.values())
    if unfinished:
        _check_room(place, disk_gb)
    # stages lock their own folders; between two of them another pipeline could take over
    with RunFolder(place).lock() if is_first() else nullcontext():
        if is_first():
            if unfinished:
                note_invocation(place, fresh=fresh)
            show(planned(stages, folders, quick=quick, fresh=fresh))
        before = checkpoint
        for number, (name, stage) in enumerate(stages.items(), 1):
            folder, begun = folders[name], time.monotonic()
            _say(f"stage {number} of {len(stages)}: {name} in {folder.path}")
            _fit(list(arguments(stage, folder.path, before, replaced, quick=quick, fresh=fresh)), folder)
            _say(f"{name} took {duration(time.monotonic() - begun)}")
            before = str(folder.checkpoint)
        if is_first():
            summarise(list(folders.values()), place)
            report_pipeline(place, list(folders.values()))
    _say(f"pipeline finished: {len(stages)} of {len(stages)} stages; the last checkpoint is {before}")


def _say(line: str) -> None:
    if is_first():
        print(line, flush=True)


def planned(
    stages: Mapping[str, PipelineStage], folders: Mapping[str, RunFolder], *, quick: bool, fresh: bool
) -> Table:
    """What is done, what is to come, and about how long it takes."""
    words = {"new": "to do", "unfinished": "to resume", "finished": "done"}
    rows, left = [], 0.0
    for name, stage in stages.items():
        status = "new" if fresh else folders[name].status
        minutes = stage.quick_minutes if quick else stage.minutes
        left += 0 if status == "finished" else minutes or 0
        rows.append((name, words[status], f"{minutes:g} min" if minutes else ""))
    if left:
        rows.append(("", "left", f"{left:g} min"))
    title = f"{len(stages)} stages; the same command goes on where it was stopped"
    return table(("stage", "", "about"), rows, left=("stage", ""), title=title, title_justify="left")


def _check_room(place: Path, gigabytes: float) -> None:
    free = free_space(place / "stage") / 1e3
    if free < gigabytes:
        raise ValueError(
            f"the pipeline needs {gigabytes:g} GB in {place}, but {free:.1f} GB are free there; make room, or name "
            "another --run_folder"
        )


def arguments(
    stage: PipelineStage, folder: Path, before: str | None, replaced: Mapping[str, Any], *, quick: bool, fresh: bool
) -> Iterator[str]:
    """The command line of one stage's `fit`; `replaced` are settings that come before those of the stage's own."""
    for config in stage.configs:
        yield from ("-c", str(config.absolute if isinstance(config, Path_fr) else config))
    for settings in (replaced, stage.settings.rows, stage.quick.rows if quick else {}):
        if settings:
            yield from ("-c", json.dumps(settings))
    yield from ("--run_folder", str(folder))
    if before is not None:
        yield from ("--model.init_args.checkpoint", before)
    if fresh:
        yield "--fresh"


def _fit(options: list[str], folder: RunFolder) -> None:
    """`fit` in this process, under its own command line: data-parallel launchers start that for the other ranks."""
    given, environment = sys.argv, set(os.environ)
    sys.argv = [given[0], "fit", *options]
    try:
        StageCLI()
    except SystemExit as end:
        # a rank that was asked to stop may end with 0 too
        if end.code not in (None, 0) or folder.status != "finished":
            raise
    finally:
        sys.argv = given
        # a launcher of this stage's processes noted there that it has started them: the next stage needs its own
        noted = set(os.environ) - environment
        for name in noted:
            del os.environ[name]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if LAUNCHED in noted:
            torch.distributed.destroy_process_group()
        else:
            # torchrun or SLURM started every rank on the pipeline: all go on, when the first has written
            with one_line():
                torch.distributed.barrier()
    gc.collect()


def command(args: Sequence[str]) -> None:
    """All stages in turn, ending with a table and a web page.

    Examples: main.py pipeline -c configs/quickstart.yaml; with a model and text of your own: main.py pipeline -c
    configs/quickstart.yaml --checkpoint ./model --text book.txt --run_folder runs/mine
    """
    parser = ArgumentParser(**about(command))
    parser.add_argument("-c", "--config", action="config", help="The pipeline, in YAML.")
    parser.add_argument("--fresh", action="store_true", help=FRESH_HELP)
    parser.add_argument(
        "--quick", action="store_true", help="A first look, with less of everything; the run folder's name gets -quick."
    )
    text = (
        "Files, folders or sources of text in place of the config's, each a domain of its own: .jsonl, .ndjson and "
        ".parquet files with a `text` in each row, .json, and plain text."
    )
    parser.add_argument("--text", type=str, nargs="+", default=[], help=text)
    parser.add_function_arguments(run, as_positional=False, skip={"fresh", "quick", "text"})
    options = parser.parse_args(list(args))
    # the parser makes namespaces of them, and None of what has nothing behind its colon
    given = {name: {k: v for k, v in vars(stage).items() if v is not None} for name, stage in options.stages.items()}
    stages = {name: PipelineStage(**settings) for name, settings in given.items()}
    run(stages, options.run_folder, options.disk_gb, options.quick, options.fresh, options.checkpoint, options.text)
