"""Scores of several networks on tasks of the evaluation harness: rows for files, a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flextron_lit.evaluation.loss_rows import Row, costs_of, name_of
from flextron_lit.evaluation.networks import Network
from flextron_lit.evaluation.results import Results, scores_of
from flextron_lit.files.ranks import tell
from flextron_lit.latency.timing import timed
from flextron_lit.terminal.console import table

if TYPE_CHECKING:
    # an optional extra
    from flextron_lit.evaluation.harness import BudgetedLM, LoadedTask


def score(
    lm: BudgetedLM, task: LoadedTask, network: Network, limit: int | None, results: Results, made: Row
) -> Mapping[str, Any]:
    """The row of a network on a task; it is kept as soon as it is there, and what is kept is not evaluated again.

    Args:
        lm: the network.
        task: what to evaluate on.
        network: within which budget.
        limit: questions of the task; None means all.
        results: where rows are kept.
        made: how, JSON-able.
    """
    row: Row = {"task": task.name, "limit": limit, **network.about()}
    known = results.known_task(row, made)
    if known is not None:
        tell(f"{network.name}: {task.name} is in {results.path} already; --fresh evaluates again")
        return known
    tell(f"{network.name}: {task.name}")
    with lm.within(network.selection):
        scores, seconds = timed(lambda: task.scores(lm, limit), lm.device)
    row |= {"costs": dict(network.spent()), "scores": scores, "seconds": seconds, "made": made}
    results.add_task(row)
    return row


def shown(rows: Iterable[Mapping[str, Any]]) -> Table:
    """For people; `±` is a standard error."""
    cells = []
    for row in rows:
        for task, of in row["scores"].items():
            scores = "\n".join(f"{name} {told(*each)}" for name, each in scores_of(of).items())
            cells.append((task, name_of(row), costs_of(row), str(of["questions"] or ""), scores))
    words = ("task", "network", "scores")
    title = "scores; ± is the harness's standard error"
    return table(("task", "network", "cost", "questions", "scores"), cells, left=words, title=title)


def told(value: float, error: float | None) -> str:
    """A score with its standard error, for people."""
    return f"{value:.3f}" + ("" if error is None else f" ±{error:.3f}")
