"""Scores of several networks on tasks of the evaluation harness: rows for files, a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from flextron_lit.evaluation.loss_rows import Row, costs_of, name_of
from flextron_lit.evaluation.networks import Network
from flextron_lit.evaluation.results import Results, metrics
from flextron_lit.latency.timing import seconds
from flextron_lit.routers.dynamic import DynamicPolicy, mean_ratio

if TYPE_CHECKING:
    # an optional extra
    from flextron_lit.evaluation.harness import BudgetedLM, LoadedTask

ERROR = "_stderr"


def score(
    lm: BudgetedLM, task: LoadedTask, selected: Sequence[Network], limit: int | None, results: Results, made: Row
) -> list[Row]:
    """Rows of every network on a task; each is kept as soon as it is there, and what is kept is not evaluated again.

    Args:
        lm: the network.
        task: what to evaluate on.
        selected: within which budgets.
        limit: questions of each task; None means all.
        results: where rows are kept.
        made: how, JSON-able.
    """
    found = []
    for network in selected:
        row: Row = {"task": task.name, "limit": limit, **network.about()}
        known = results.known_task(row, made)
        if known is None:
            rank_zero_info(f"{network.name}: {task.name}")
            known = {**row, **_scores(lm, task, network, limit), "made": made}
            results.add_task(known)
        else:
            rank_zero_info(f"{network.name}: {task.name} is in {results.path} already; --fresh evaluates again")
        found.append(known)
    return found


def _scores(lm: BudgetedLM, task: LoadedTask, network: Network, limit: int | None) -> Row:
    scores: list[Mapping[str, Any]] = []
    with lm.within(network.selection):
        took = seconds(lambda: scores.append(task.scores(lm, limit)), lm.device)
    costs = network.costs
    if isinstance(network.selection, DynamicPolicy):
        table = network.selection.table
        costs = {table.name: mean_ratio(network.selection.take(), table)}
    return {"costs": dict(costs), "scores": scores[0], "seconds": took}


def shown(rows: Iterable[Mapping[str, Any]]) -> Table:
    """For people; `±` is a standard error."""
    table = Table(title="scores; ± is the harness's standard error")
    for column in ("task", "network"):
        table.add_column(column, no_wrap=True)
    for column in ("cost", "questions", "scores"):
        table.add_column(column, justify="left" if column == "scores" else "right", no_wrap=True)
    for row in rows:
        for task, of in row["scores"].items():
            table.add_row(task, name_of(row), costs_of(row), str(of["questions"] or ""), "\n".join(_told(of)))
    return table


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
