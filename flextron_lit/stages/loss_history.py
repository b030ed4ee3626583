"""Loss against cost, as people look at it: a table, CSV and JSON files, a figure."""

from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from flextron_lit.costs import CostTable
from flextron_lit.files.damage import read_rows
from flextron_lit.files.whole_file import whole_file, write_csv, write_json
from flextron_lit.stages.validation import DYNAMIC, ROUTED, ValidationResult
from flextron_lit.terminal.console import show, table

Row = dict[str, Any]


class Report:
    """Rows of (step, sub-network, domain, loss), kept in `<folder>/<name>.json`, `.csv` and `.png`.

    Args:
        folder: the run folder.
        name: stem of the files.
        append: keep the rows that an earlier part of the run wrote.
    """

    table: CostTable
    """The costs of the last result that was added."""

    def __init__(self, folder: Path, name: str, *, append: bool) -> None:
        self.stem = folder / name
        self.rows: list[Row] = read_rows(self.stem.with_suffix(".json")) if append else []

    def add(self, step: int, result: ValidationResult) -> None:
        """Put in the table of a step, in place of one that is there, and write all files."""
        self.table = result.costs
        self.rows = [row for row in self.rows if row["step"] != step] + result.rows(step)
        self.write()

    def drop_after(self, step: int) -> None:
        """Forget the tables of later steps."""
        self.rows = [row for row in self.rows if row["step"] <= step]

    def write(self) -> None:
        """Write the three files, each whole or not at all."""
        write_json(self.stem.with_suffix(".json"), self.rows)
        write_csv(self.stem.with_suffix(".csv"), self.rows)
        with whole_file(self.stem.with_suffix(".png")) as partial:
            self.figure().savefig(partial, dpi=120, format="png")

    @property
    def steps(self) -> list[int]:
        """Steps with a table, ascending."""
        return sorted({row["step"] for row in self.rows})

    def losses(self, step: int) -> dict[str, dict[str, float]]:
        """Sub-network to domain to loss, with the mean over domains as a last `mean`."""
        by_domain = self._values(step, "loss")
        return {name: {**losses, "mean": fmean(losses.values())} for name, losses in by_domain.items()}

    def costs(self, step: int | None = None) -> dict[str, float]:
        """Sub-network to cost, the mean over domains: what a dynamic router costs depends on the text.

        Args:
            step: of which table; None means the last, since what a router answers to a budget changes as it learns.
        """
        by_domain = self._values(self.steps[-1] if step is None else step, self.table.name)
        return {name: fmean(costs.values()) for name, costs in by_domain.items()}

    def _values(self, step: int, column: str) -> dict[str, dict[str, float]]:
        """Sub-network to domain to what a column of a step's table says."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            if row["step"] == step:
                found.setdefault(row["sub_network"], {})[row["domain"]] = row[column]
        return found

    def figure(self) -> Figure:
        """Mean loss against cost, for the first and the last table; what routers choose on lines of their own.

        The tables between are pale lines, so that the curve is seen to move.
        """
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        between = dict.fromkeys(self.steps[1:-1])
        for step, style in {**between, self.steps[0]: "o--", self.steps[-1]: "s-"}.items():
            for kind in ("", ROUTED, DYNAMIC):
                self._line(axes, step, style, kind)
        if self.table.unit != "ms":
            axes.xaxis.set_major_formatter(EngFormatter())
        axes.set(xlabel=f"{self.table.name} ({self.table.unit})", ylabel="loss (nats per token, mean over domains)")
        axes.set_title("Loss of nested sub-networks against their cost")
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def _line(self, axes: Axes, step: int, style: str | None, kind: str) -> None:
        """Add a line of one table; without a style a pale one that the legend does not name."""
        costs = self.costs(step)
        means = {name: by_domain["mean"] for name, by_domain in self.losses(step).items()}
        names = sorted((name for name in means if _kind(name) == kind), key=costs.__getitem__)
        if not names:
            return
        places = [costs[n] for n in names], [means[n] for n in names]
        if style is None:
            axes.plot(*places, color="grey", alpha=0.25, linewidth=0.8)
            return
        axes.plot(*places, style, label=f"{kind}, step {step}" if kind else f"step {step}")
        if step == self.steps[-1]:
            for name in names:
                axes.annotate(name, (costs[name], means[name]), textcoords="offset points", xytext=(3, 5))

    def show(self) -> None:
        """Print the last table."""
        step = self.steps[-1]
        self._print(f"loss at step {step}, nats per token", self.losses(step), lambda _, __, loss: f"{loss:.3f}")

    def show_change(self) -> None:
        """Print the first table beside the last."""
        if len(self.steps) < 2:
            return
        first, last = self.losses(self.steps[0]), self.losses(self.steps[-1])
        title = f"loss in nats per token, step {self.steps[0]} -> step {self.steps[-1]}"

        def change(name: str, domain: str, loss: float) -> str:
            # an older program called some domains and budgets otherwise
            before = first.get(name, {}).get(domain)
            return f"{loss:.2f}" if before is None else f"{before:.2f} -> {loss:.2f}"

        self._print(title, last, change)

    def _print(self, title: str, losses: dict[str, dict[str, float]], cell: Any) -> None:
        costs = self.costs()
        rows = [
            (name, self.table.short(costs[name]), *(cell(name, domain, loss) for domain, loss in by_domain.items()))
            for name, by_domain in losses.items()
        ]
        columns = ("sub-network", self.table.name, *next(iter(losses.values())))
        show(table(columns, rows, left=["sub-network"], title=title))


def _kind(name: str) -> str:
    """Which line of the figure a sub-network belongs to: "" for those that no router chose."""
    return next((kind for kind in (ROUTED, DYNAMIC) if name.startswith(kind)), "")
