"""The files of an evaluation: what is in them already is not evaluated again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flextron_lit import checkpoint
from flextron_lit.checkpoint.location import Location
from flextron_lit.evaluation.loss_rows import Row, flat
from flextron_lit.files.damage import damage, number, read_json
from flextron_lit.files.ranks import tell
from flextron_lit.files.whole_file import write_csv, write_json

JSON, CSV, HTML = "evaluation.json", "evaluation.csv", "evaluation.html"
NOT_COMPARED = ("command", "git_commit", "seed", "date")
"""Of how something was made: differs without making another result; the seed of intervals is asked for apart."""
ERROR = "_stderr"
"""What the harness calls the standard error of a metric has it in its name."""
KEY = ("task", "network", "budget", "limit", "sub_network")
"""What a row of tasks is known by: a budget means another sub-network once there is another latency table."""


@dataclass
class Results:
    """`evaluation.json`: one part for losses, one for tasks; each says how it was made.

    Args:
        folder: where it lies.
        sha256: of the checkpoint that is evaluated.
    """

    folder: Path
    sha256: str
    losses: Row | None = None
    """How they were made, what was asked, and the rows; None before they were measured."""
    tasks: list[Row] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The JSON file."""
        return self.folder / JSON

    @classmethod
    def read(cls, folder: Path, sha256: str, *, fresh: bool) -> Results:
        """What is there of this checkpoint; nothing, if it is to be made anew.

        Raises:
            ValueError: if the file is damaged, or of another checkpoint.
        """
        path = folder / JSON
        if fresh or not path.is_file():
            return cls(folder, sha256)
        with damage(path, "start anew with --fresh"):
            content = read_json(path)
            found = cls(folder, str(content["checkpoint"]), _read(content["losses"]), list(content["tasks"]))
        if found.sha256 != sha256:
            raise ValueError(
                f"{path} is of another checkpoint, or of this one before it changed ({found.sha256[:12]}, now "
                f"{sha256[:12]}); name another --output, or replace it with --fresh"
            )
        return found

    def known_losses(self, made: Row, asked: Row) -> list[Row] | None:
        """Rows of the same question, answered under the same conditions."""
        if self.losses is None or self.losses["asked"] != asked or not _same(self.losses["made"], made):
            return None
        return list(self.losses["rows"])

    def known_task(self, row: Row, made: Row) -> Row | None:
        """A finished row of the same task and network, evaluated under the same conditions."""
        return next((r for r in self.tasks if _key(r) == _key(row) and _same(r["made"], made)), None)

    def add_task(self, row: Row) -> None:
        """Keep a finished row, in place of one of the same task and network."""
        self.tasks = [*(other for other in self.tasks if _key(other) != _key(row)), row]
        self.write()

    def write(self) -> None:
        """Write both files, each whole or not at all.

        Raises:
            ValueError: if they cannot be written.
        """
        content = {"checkpoint": self.sha256, "losses": self.losses, "tasks": self.tasks}
        try:
            write_json(self.path, content)
            write_csv(self.folder / CSV, self._flat())
        except OSError as error:
            raise ValueError(f"cannot write the results to {self.folder} ({error}); name another --output") from error

    def note_in(self, folder: Path, made: Row) -> None:
        """Note the numbers in a checkpoint; what was noted of the same file is replaced.

        Args:
            folder: the checkpoint.
            made: how, JSON-able.
        """
        noted = {"file": str(self.path.absolute()), "made": made, "results": list(self._numbers())}
        try:
            checkpoint.note_evaluation(folder, noted)
        except OSError as error:
            # after what may have been hours: the results are safe in their own file
            tell(f"note: cannot note the results in {folder} ({error}); --leave_checkpoint does without")

    def _numbers(self) -> Iterator[Row]:
        """The numbers alone, for the checkpoint's record."""
        for row in self.losses["rows"] if self.losses else []:
            yield {**_whose(row), "metric": "loss", "text": row["text"], "value": row["loss"]}
        for row in self.tasks:
            for task, of in row["scores"].items():
                for metric, (value, _) in scores_of(of).items():
                    yield {**_whose(row), "metric": metric, "text": task, "value": value}

    def _flat(self) -> list[Row]:
        rows = list(flat(self.losses["rows"])) if self.losses else []
        for row in self.tasks:
            shared = {**_whose(row), "cost": next(iter(row["costs"].values()), 1.0)}
            for task, of in row["scores"].items():
                rows.append({**shared, "text": task, "documents": of["questions"], **metrics(of)})
        return rows


def metrics(of: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a task alone."""
    return {name: value for name, value in of.items() if name != "questions"}


def scores_of(of: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """Value and standard error of every metric of a task."""
    return {name: (number(value), _error(of, name)) for name, value in metrics(of).items() if ERROR not in name}


def _error(of: Mapping[str, Any], name: str) -> float | None:
    """The standard error of a metric, where the harness has one."""
    # of a filtered metric it names the filter after a comma: acc_stderr,filter
    metric, _, of_filter = name.partition(",")
    error: float | None = of.get(f"{metric}{ERROR}{',' * bool(of_filter)}{of_filter}")
    return error


def default_output(location: Location) -> Path:
    """The run folder, or a sibling of a checkpoint that lies in none."""
    run = location.run
    if run is not None:
        return run.path
    return location.checkpoint.with_name(f"{location.checkpoint.absolute().name}-evaluation")


def _read(losses: Row | None) -> Row | None:
    """The same with numbers that are none where JSON has null."""
    if losses is None:
        return None
    rows = [{**row, **{name: number(row[name]) for name in ("loss", "perplexity")}} for row in losses["rows"]]
    return {**losses, "rows": rows}


def _whose(row: Row) -> Row:
    return {"network": row["network"], "budget": row["budget"]}


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _same(before: Row, now: Row) -> bool:
    one, other = ({k: v for k, v in made.items() if k not in NOT_COMPARED} for made in (before, now))
    return one == other
