"""Scores of several networks on tasks of the evaluation harness: rows for files, a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from flextron_lit.evaluation.loss_rows import Row, costs_of, name_of
from flextron_lit.evaluation.networks import Network
from flextron_lit.evaluation.results import ERROR, Results, metrics
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
    cells = [
        (task, name_of(row), costs_of(row), str(of["questions"] or ""), "\n".join(_told(of)))
        for row in rows
        for task, of in row["scores"].items()
    ]
    words = ("task", "network", "scores")
    title = "scores; ± is the harness's standard error"
    return table(("task", "network", "cost", "questions", "scores"), cells, left=words, title=title)


def error_of(of: Mapping[str, Any], name: str) -> float | None:
    """The standard error of a metric, where the harness has one."""
    # of a filtered metric it names the filter after a comma: acc_stderr,filter
    metric, _, of_filter = name.partition(",")
    error: float | None = of.get(f"{metric}{ERROR}{',' * bool(of_filter)}{of_filter}")
    return error


def _told(of: Mapping[str, Any]) -> Iterable[str]:
    for name, value in metrics(of).items():
        if ERROR not in name:
            error = error_of(of, name)
            yield f"{name} {value:.3f}" + ("" if error is None else f" ±{error:.3f}")
