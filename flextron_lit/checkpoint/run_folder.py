"""A run folder is a promise: the same command resumes what is unfinished and never repeats what is done."""

import fcntl
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml

from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.differences import differences, listed
from flextron_lit.files.ranks import tell
from flextron_lit.files.whole_file import write_json, write_text

Status = Literal["new", "unfinished", "finished"]
CONFIG, STATUS, LOCK = "config.yaml", "status.json", ".lock"
MEND = "restore it, or start anew with --fresh"
PROCESSES = ("trainer.devices", "trainer.num_nodes", "data.init_args.batch_size")
"""Settings of which an unfinished run may go on with others: whether they make the same steps, its state says."""


class RunFolder:
    """The folder of one stage's run.

    ```
    config.yaml        the resolved config, complete: `python main.py fit -c config.yaml` repeats the run
    status.json        whether the run is finished
    resume.ckpt        Lightning's state of an unfinished run (beside it what other processes hold of a shared-out one)
    flextron/          the Flextron checkpoint that the stage wrote
    tensorboard/       event files
    validation.*       tables
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoint(self) -> Path:
        """Where the stage's Flextron checkpoint lies."""
        return self.path / "flextron"

    @property
    def resume_state(self) -> Path:
        """Lightning's checkpoint of an unfinished run."""
        return self.path / "resume.ckpt"

    @property
    def status(self) -> Status:
        """How far the run is.

        Raises:
            ValueError: if its record is damaged.
        """
        file = self.path / STATUS
        if not file.exists():
            return "new"
        with damage(file, MEND):
            finished = read_json(file)["finished"]
        return "finished" if finished else "unfinished"

    @property
    def holds_work(self) -> bool:
        """Whether there is something to lose: a saved state or a checkpoint. A run that was refused left neither."""
        return self.resume_state.exists() or self.checkpoint.exists()

    @property
    def started_from(self) -> str | None:
        """The checkpoint or dense model that the run here started from; None if there is none that did anything."""
        config = self.config if self.holds_work else None
        with damage(self.path / CONFIG, MEND):
            return None if config is None else str(config["model"]["init_args"]["checkpoint"])

    @property
    def config(self) -> dict[str, Any] | None:
        """The resolved config of the run here; None if there is no run.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.path / CONFIG
        if not path.exists():
            return None
        with damage(path, MEND):
            return dict(yaml.safe_load(path.read_text(encoding="utf-8")))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second run out while one is at work; the lock goes with the process, however that ends.

        Where a file system knows no locks, as some that are reached over a network, nothing does; that is said.

        Raises:
            ValueError: if another process holds the folder, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / LOCK).open("a+", encoding="utf-8")
        except OSError as error:
            raise ValueError(f"cannot write to the run folder {self.path} ({error}); name another one") from error
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                handle.seek(0)
                holder = handle.read().strip() or "another process"
                raise ValueError(f"{holder} is working in {self.path}; wait for it, or stop it") from error
            except OSError as error:
                tell(f"note: nothing keeps a second run out of {self.path}: its file system has no locks ({error})")
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {platform.node()}\n")
            handle.flush()
            # a loader's workers outlive a killed run by seconds, and would keep the lock that they inherit
            os.register_at_fork(after_in_child=handle.close)
            yield

    def begin(
        self, config: Mapping[str, Any], *, fresh: bool, today: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    ) -> Status:
        """Enter the folder with a resolved config, which binds it as soon as there is something to lose.

        Args:
            config: resolved.
            fresh: delete what is there first.
            today: brings the config of an older run to the form that this program writes.

        Returns:
            `finished` if there is nothing to do, `unfinished` to resume, `new` to start.

        Raises:
            ValueError: if the folder belongs to a run with another config, the message then lists the keys; or if its
                run is finished, but the checkpoint is gone.
        """
        if fresh:
            self.clear()
        status = self.status
        if status == "unfinished" and not self.holds_work:
            # refused, or killed before its first saved state: what it logged would be logged again
            self.clear()
            status = "new"
        if status == "new":
            self._start(config)
            return status
        before = self.config
        if before is None:
            raise ValueError(f"{self.path} holds a run ({status}), but no {CONFIG}; {MEND}")
        changes = list(differences(before, config)) and list(differences(today(before), config))
        if status == "unfinished":
            changes = [each for each in changes if each.split(": ")[0] not in PROCESSES]
        if changes:
            shown = "\n".join(listed(changes))
            raise ValueError(
                f"{self.path} holds a run ({status}) with another config:\n{shown}\n"
                "Name another --run_folder, or start anew with --fresh (which deletes what is there)"
            )
        if status == "finished" and not self.checkpoint.is_dir():
            raise ValueError(
                f"{self.path} is finished, but its checkpoint {self.checkpoint} is not there: put it back, or start "
                "anew with --fresh"
            )
        if status == "unfinished" and not self.resume_state.exists():
            # killed between a best checkpoint and the state behind it
            self.clear()
            self._start(config)
            return "new"
        return status

    def _start(self, config: Mapping[str, Any]) -> None:
        write_text(self.path / CONFIG, yaml.safe_dump(dict(config), sort_keys=False))
        write_json(self.path / STATUS, {"finished": False})

    def finish(self) -> None:
        """Mark the run as done, and drop the state that only an unfinished one needs."""
        write_json(self.path / STATUS, {"finished": True})
        for part in parts_of(self.resume_state):
            part.unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete everything in the folder but the lock.

        Raises:
            ValueError: if the folder holds something that is not a run.
        """
        entries = {entry.name for entry in self.path.iterdir()} - {LOCK}
        if entries and not entries & {CONFIG, STATUS}:
            raise ValueError(f"--fresh would delete {self.path}, which is not a run folder; name another --run_folder")
        for entry in self.path.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def beside(path: Path, mark: str, rank: int) -> Path:
    """Where a process keeps its part of a shared-out state; the first one's is the state itself, written last."""
    return path.with_name(f"{path.stem}-{mark}-rank{rank}{path.suffix}") if rank else path


def parts_of(path: Path) -> Iterator[Path]:
    """All files of a state: itself, and the parts of other processes, those of states before it too."""
    yield path
    yield from path.parent.glob(f"{path.stem}-*-rank*{path.suffix}*")
