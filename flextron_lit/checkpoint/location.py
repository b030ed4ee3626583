"""Which Flextron checkpoint a folder named on the command line means."""

from dataclasses import dataclass
from pathlib import Path

from flextron_lit import checkpoint
from flextron_lit.checkpoint.run_folder import RunFolder

FOLDER_HELP = "A Flextron checkpoint, or a run folder that holds one."


@dataclass(frozen=True)
class Location:
    """Where a checkpoint lies."""

    checkpoint: Path
    """The folder with flextron.json."""
    run_folder: RunFolder | None
    """The run folder that was named instead of it."""

    @property
    def run(self) -> RunFolder | None:
        """The run that wrote the checkpoint, where the checkpoint lies in its folder."""
        if self.run_folder is not None:
            return self.run_folder
        above = RunFolder(self.checkpoint.absolute().parent)
        ours = above.checkpoint.name == self.checkpoint.absolute().name and above.status != "new"
        return above if ours else None

    def __str__(self) -> str:
        if self.run_folder is None:
            return str(self.checkpoint)
        return f"{self.checkpoint}, of the run folder {self.run_folder.path} ({self.run_folder.status})"


def locate(folder: Path) -> Location:
    """The folder itself, or the `flextron` folder in it if it is a run folder.

    Raises:
        ValueError: if it is neither; the message says what is missing, and what lies near.
    """
    if checkpoint.is_flextron(folder):
        return Location(folder, None)
    run = RunFolder(folder)
    if checkpoint.is_flextron(run.checkpoint):
        return Location(run.checkpoint, run)
    raise ValueError(_why_not(folder, run))


def resolved(source: str) -> str:
    """A source of a network: in the place of a run folder the checkpoint in it.

    Raises:
        ValueError: if it is a folder that holds none.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / checkpoint.CONFIG).is_file():
        return str(locate(folder).checkpoint)
    return source


def _why_not(folder: Path, run: RunFolder) -> str:
    if not folder.exists():
        return f"there is no folder {folder}"
    if not folder.is_dir():
        return f"{folder} is a file; name the folder of a Flextron checkpoint, or a run folder"
    if run.status != "new":
        return f"{folder} is a run folder ({run.status}) without a checkpoint: {run.checkpoint} is written when it ends"
    inside = sorted(str(found.parent.parent) for found in folder.glob(f"*/{run.checkpoint.name}/{checkpoint.RECORD}"))
    if inside:
        return f"{folder} is no run folder itself, but holds some; name one of {', '.join(inside)}"
    if (folder / checkpoint.CONFIG).is_file():
        return f"{folder} is a dense model: it has no {checkpoint.RECORD}; `fit` makes a Flextron checkpoint of it"
    return f"{folder} is no Flextron checkpoint: there is neither {folder / checkpoint.RECORD} nor {run.checkpoint}"
