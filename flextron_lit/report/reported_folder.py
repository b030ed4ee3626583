"""What a report is made of: the run folders of a pipeline, one run folder, or a checkpoint alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flextron_lit import checkpoint
from flextron_lit.checkpoint.location import locate
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.report.origin import INVOCATIONS
from flextron_lit.report.summary import SUMMARY


@dataclass(frozen=True)
class Source:
    """Where the files of a report lie."""

    folder: Path
    """What was named."""
    checkpoint: Path
    """The last one."""
    stages: tuple[RunFolder, ...] = ()
    """Run folders of finished stages, in order; none for a checkpoint alone."""

    @classmethod
    def of(cls, folder: Path, checkpoint: Path, run: RunFolder | None) -> Source:
        """Of one checkpoint, and of the run that wrote it if that is there and finished."""
        return cls(folder, checkpoint, () if run is None or run.status != "finished" else (run,))

    @property
    def page(self) -> Path:
        """Where the report goes if nothing else is said: no file is added to a checkpoint."""
        return self.folder / "report.html" if self.stages else Path("report.html")


def find(folder: Path) -> Source:
    """What a folder holds.

    Args:
        folder: of a pipeline, of one run, or a Flextron checkpoint.

    Raises:
        ValueError: if it is none of these, or no stage of the pipeline is finished.
    """
    if (folder / SUMMARY).is_file() or (folder / INVOCATIONS).is_file():
        runs = (RunFolder(path.parent) for path in folder.glob("*/status.json"))
        stages = sorted((run for run in runs if run.status == "finished"), key=_stages_behind)
        if not stages:
            raise ValueError(f"{folder} is a pipeline of which no stage is finished; run it on, then report")
        return Source(folder, stages[-1].checkpoint, tuple(stages))
    location = locate(folder)
    return Source.of(folder, location.checkpoint, location.run_folder)


def _stages_behind(run: RunFolder) -> int:
    """Each stage adds a record to the history of the checkpoint that it started from."""
    return len(checkpoint.read(run.checkpoint).history)
