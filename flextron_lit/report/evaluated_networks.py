"""What `evaluate` found, for the report: measures of the trade-off, and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flextron_lit import checkpoint
from flextron_lit.costs import CostTable
from flextron_lit.evaluation.loss_rows import ALL, costs_of, half, name_of, signed
from flextron_lit.evaluation.results import Results, metrics
from flextron_lit.evaluation.task_rows import ERROR, error_of
from flextron_lit.report.points import LOSS, Measure, Point, of_dynamic
from flextron_lit.space import ElasticSpace, SubNetwork
from flextron_lit.stages.validation import mean_widths

EVALUATE = "evaluate"
NORMAL = 1.96
"""Standard errors to either side that make a 95 % interval."""
Rows = Sequence[Mapping[str, Any]]


def noted(folder: Path, notes: list[str]) -> list[Results]:
    """Evaluations that a checkpoint's record names; `notes` say which of them are not shown.

    Args:
        folder: the checkpoint.
        notes: for the reader of the page.
    """
    found = list[Results]()
    there = checkpoint.evaluations(folder)
    sha256 = checkpoint.digest(folder) if there else ""
    for each in there:
        path = Path(each["file"])
        if not path.is_file():
            notes.append(f"Not shown: the evaluation in {path}, which is not there.")
            continue
        try:
            found.append(Results.read(path.parent, sha256, fresh=False))
        except (ValueError, OSError) as error:
            notes.append(f"Not shown: an evaluation. {error}.")
    return found


def measures(results: Sequence[Results], space: ElasticSpace, tables: Mapping[str, CostTable]) -> Iterator[Measure]:
    """How good the evaluated networks are: their loss, then every score.

    Args:
        results: of evaluations.
        space: the choices.
        tables: the costs to show.
    """
    for each in results:
        where = f", {name_of_folder(each)}" * (len(results) > 1)
        if each.losses is not None:
            points = [_loss_point(rows, space, tables) for rows in by_network(each.losses["rows"])]
            yield Measure(f"loss, evaluated{where}", LOSS, points)
        for limit, rows in by_limit(each.tasks).items():
            asked = f", {limit} questions" if limit else ""
            for task, metric in columns(rows):
                found = [_score_point(row, task, metric, space, tables) for row in rows if has(row, task, metric)]
                said = f"{metric} of {task}"
                yield Measure(f"{said}{asked}{where}", said, found, is_loss=False)


def name_of_folder(results: Results) -> str:
    """What to call an evaluation."""
    return results.folder.resolve().name


def by_limit(rows: Rows) -> dict[int | None, Rows]:
    """Rows of tasks by how many questions were asked of each: with others they do not compare."""
    return {limit: [r for r in rows if r["limit"] == limit] for limit in dict.fromkeys(row["limit"] for row in rows)}


def by_network(rows: Rows) -> list[Rows]:
    """Rows of each network, a row a text."""
    names = dict.fromkeys(name_of(row) for row in rows)
    return [[row for row in rows if name_of(row) == name] for name in names]


def columns(rows: Rows) -> list[tuple[str, str]]:
    """Tasks and their metrics, each once; standard errors stand beside them."""
    found = ((task, metric) for row in rows for task, of in row["scores"].items() for metric in metrics(of))
    return [each for each in dict.fromkeys(found) if ERROR not in each[1]]


def has(row: Mapping[str, Any], task: str, metric: str) -> bool:
    """Whether a row is of a task and has a metric."""
    return metric in row["scores"].get(task, {})


def _loss_point(rows: Rows, space: ElasticSpace, tables: Mapping[str, CostTable]) -> Point:
    total = next((row for row in rows if row["text"] == ALL), rows[0])
    losses = {row["text"]: row["loss"] for row in rows if row["text"] != ALL}
    interval = total["interval"] and tuple(total["interval"])
    return Point(value=total["loss"], losses=losses, interval=interval, **_network(total, space, tables))


def _score_point(
    row: Mapping[str, Any], task: str, metric: str, space: ElasticSpace, tables: Mapping[str, CostTable]
) -> Point:
    of = row["scores"][task]
    value, error = of[metric], error_of(of, metric)
    interval = None if error is None else (value - NORMAL * error, value + NORMAL * error)
    return Point(value=value, losses={}, interval=interval, **_network(row, space, tables))


def _network(row: Mapping[str, Any], space: ElasticSpace, tables: Mapping[str, CostTable]) -> dict[str, Any]:
    """What a point says of the network itself."""
    known = {"name": name_of(row), "kind": row["network"], "budget": row["budget"], "source": EVALUATE}
    if row["sub_network"] is None:
        return {**known, "widths": {}, "costs": of_dynamic(row["costs"], tables)}
    sub_network = SubNetwork.from_json(row["sub_network"])
    costs = {name: table.cost(sub_network) for name, table in tables.items()}
    return {**known, "widths": mean_widths(space, space.one_hot(sub_network)), "costs": costs}


# --- tables -----------------------------------------------------------------------------------------------------


def loss_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Head and cells: losses of every network on every text, and differences over all of them."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    cells = []
    for of_network in by_network(rows):
        last = of_network[-1]
        losses = {row["text"]: f"{row['loss']:.3f}{half(row['interval'])}" for row in of_network}
        differences = [signed(last[over]) for over in ("over_full", "over_static")]
        cells.append([name_of(last), costs_of(last, ", "), *(losses.get(text, "") for text in texts), *differences])
    return ["network", "cost", *texts, "over full", "over static"], cells


def score_table(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Head and cells: every score of every network."""
    asked = columns(rows)
    cells = []
    for of_network in by_network(rows):
        found = {each: _score(row, *each) for row in of_network for each in asked if has(row, *each)}
        # what a dynamic router costs depends on the task
        costs = " / ".join(dict.fromkeys(costs_of(row, ", ") for row in of_network))
        cells.append([name_of(of_network[0]), costs, *(found.get(each, "") for each in asked)])
    return ["network", "cost", *(f"{task} {metric}" for task, metric in asked)], cells


def _score(row: Mapping[str, Any], task: str, metric: str) -> str:
    of = row["scores"][task]
    error = error_of(of, metric)
    return f"{of[metric]:.3f}" + ("" if error is None else f" ±{error:.3f}")


def questions(rows: Rows) -> str:
    """How many questions tasks had, for a caption."""
    counts = {task: of["questions"] for row in rows for task, of in row["scores"].items() if of["questions"]}
    return ", ".join(f"{task} {count}" for task, count in counts.items())


def commands(results: Sequence[Results]) -> list[dict[str, str]]:
    """How evaluations were made, each command once, as rows of the page's provenance."""
    made = [row["made"] for each in results for row in ([each.losses] if each.losses else []) + each.tasks]
    rows = [
        {"command": m["command"], "date": m.get("date", ""), "machine": f"{m['device']['name']}; {m['dtype']}"}
        for m in made
    ]
    return list({tuple(row.values()): row for row in rows}.values())
