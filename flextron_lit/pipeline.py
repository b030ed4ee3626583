"""All stages of a config in turn, each in a run folder of its own, each from the checkpoint of the one before."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_fr

from flextron_lit.cli import FRESH_HELP, StageCLI
from flextron_lit.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class PipelineStage:
    """One stage: what `fit` would be given."""

    configs: list[Path_fr]
    """Config files, later ones winning; paths are relative to the pipeline's own file."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings on top of the files."""


def run(stages: dict[str, PipelineStage], run_folder: Path = Path("runs/pipeline"), fresh: bool = False) -> None:
    """Run all stages in turn; the same command picks up at the first unfinished one.

    Args:
        stages: the stages by name, in order; each writes to the folder of its name in `run_folder`.
        run_folder: everything the pipeline writes.
        fresh: delete what the run folders hold and start anew.

    Raises:
        ValueError: if there is no stage.
    """
    if not stages:
        raise ValueError("the pipeline lists no stages")
    before: Path | None = None
    for number, (name, stage) in enumerate(stages.items(), 1):
        folder = RunFolder(run_folder / name)
        print(f"stage {number} of {len(stages)}: {name} in {folder.path}", flush=True)
        _fit(list(arguments(stage, folder.path, before, fresh=fresh)))
        before = folder.checkpoint
    print(f"pipeline finished: {len(stages)} of {len(stages)} stages; the last checkpoint is {before}")


def arguments(stage: PipelineStage, folder: Path, before: Path | None, *, fresh: bool) -> Iterator[str]:
    """The command line of one stage's `fit`."""
    for config in stage.configs:
        yield from ("-c", str(config.absolute if isinstance(config, Path_fr) else config))
    if stage.settings:
        yield from ("-c", json.dumps(stage.settings))
    yield from ("--run_folder", str(folder))
    if before is not None:
        yield from ("--model.init_args.checkpoint", str(before))
    if fresh:
        yield "--fresh"


def _fit(options: list[str]) -> None:
    """`fit` in this process, under its own command line: data-parallel launchers start that for the other ranks."""
    given = sys.argv
    sys.argv = [given[0], "fit", *options]
    try:
        StageCLI()
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
    finally:
        sys.argv = given
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()


def _plain(value: Any) -> Any:
    """Settings as they were written; the parser makes namespaces of what looks like a class."""
    if isinstance(value, Namespace):
        return {name: _plain(inner) for name, inner in vars(value).items()}
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def command(args: Sequence[str]) -> None:
    """`python main.py pipeline`."""
    parser = ArgumentParser(prog="main.py pipeline", description="Example: main.py pipeline -c configs/quickstart.yaml")
    parser.add_argument("-c", "--config", action="config", help="The pipeline, in YAML.")
    parser.add_argument("--fresh", action="store_true", help=FRESH_HELP)
    parser.add_function_arguments(run, as_positional=False, skip={"fresh"})
    options = parser.parse_args(list(args))
    # not through instantiate_classes: it would make callbacks of what settings only describe
    stages = {name: PipelineStage(configs=s.configs, settings=_plain(s.settings)) for name, s in options.stages.items()}
    run(stages, options.run_folder, options.fresh)
