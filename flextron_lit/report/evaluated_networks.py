"""What `evaluate` found, for the report: measures of the trade-off, and tables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flextron_lit import checkpoint
from flextron_lit.costs import CostTable
from flextron_lit.evaluation.loss_rows import ALL, costs_of, half, name_of, signed
from flextron_lit.evaluation.results import Results, scores_of
from flextron_lit.evaluation.task_rows import told
from flextron_lit.report.point_costs import of_dynamic
from flextron_lit.report.points import LOSS, Measure, Point
from flextron_lit.report.rendering import Section, Table
from flextron_lit.space import ElasticSpace, SubNetwork
from flextron_lit.stages.validation import mean_widths

EVALUATE = "evaluate"
NORMAL = 1.96
"""Standard errors to either side that make a 95 % interval."""
Row = Mapping[str, Any]
Rows = Sequence[Row]
Metric = tuple[str, str]
"""A task, and one of its metrics."""


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
        where = f", {_name(each)}" * (len(results) > 1)
        if each.losses is not None:
            points = [_loss_point(rows, space, tables) for rows in _by_network(each.losses["rows"])]
            yield Measure(f"loss, evaluated{where}", LOSS, points)
        for limit, rows in _by_limit(each.tasks).items():
            asked = f", {limit} questions" if limit else ""
            for task, metric in _metrics(rows):
                found = [_score_point(r, (task, metric), space, tables) for r in rows if (task, metric) in _scores(r)]
                title = f"{metric} of {task}"
                yield Measure(f"{title}{asked}{where}", title, found, is_loss=False)


def sections(results: Sequence[Results]) -> Iterator[Section]:
    """Tables of every evaluation: its losses, then its scores."""
    for each in results:
        losses = [] if each.losses is None else [_loss_table(each.losses["rows"])]
        scores = [_score_table(rows) for rows in _by_limit(each.tasks).values()]
        yield f"Evaluated: {_name(each)}", [*losses, *scores]


def commands(results: Sequence[Results]) -> list[tuple[str, str, str]]:
    """Command, date and machine of how evaluations were made, each once."""
    made = [row["made"] for each in results for row in ([each.losses] if each.losses else []) + each.tasks]
    rows = ((m["command"], m.get("date", ""), f"{m['device']['name']}; {m['dtype']}") for m in made)
    return list(dict.fromkeys(rows))


def _name(results: Results) -> str:
    return results.folder.resolve().name


def _by_limit(rows: Rows) -> dict[int | None, Rows]:
    """Rows of tasks by how many questions were asked of each: with others they do not compare."""
    return {limit: [r for r in rows if r["limit"] == limit] for limit in dict.fromkeys(row["limit"] for row in rows)}


def _by_network(rows: Rows) -> list[Rows]:
    """Rows of each network, a row a text or task."""
    names = dict.fromkeys(name_of(row) for row in rows)
    return [[row for row in rows if name_of(row) == name] for name in names]


def _scores(row: Row) -> dict[Metric, tuple[float, float | None]]:
    """Value and standard error of every metric."""
    return {(task, name): each for task, of in row["scores"].items() for name, each in scores_of(of).items()}


def _metrics(rows: Rows) -> list[Metric]:
    """Of all rows, each once."""
    return list(dict.fromkeys(each for row in rows for each in _scores(row)))


# --- points -----------------------------------------------------------------------------------------------------


def _loss_point(rows: Rows, space: ElasticSpace, tables: Mapping[str, CostTable]) -> Point:
    total = next((row for row in rows if row["text"] == ALL), rows[0])
    losses = {row["text"]: row["loss"] for row in rows if row["text"] != ALL}
    interval = total["interval"] and tuple(total["interval"])
    return Point(value=total["loss"], losses=losses, interval=interval, **_network(total, space, tables))


def _score_point(row: Row, of: Metric, space: ElasticSpace, tables: Mapping[str, CostTable]) -> Point:
    value, error = _scores(row)[of]
    interval = None if error is None else (value - NORMAL * error, value + NORMAL * error)
    return Point(value=value, losses={}, interval=interval, **_network(row, space, tables))


def _network(row: Row, space: ElasticSpace, tables: Mapping[str, CostTable]) -> dict[str, Any]:
    """What a point says of the network itself."""
    known = {"name": name_of(row), "kind": row["network"], "budget": row["budget"], "source": EVALUATE}
    if row["sub_network"] is None:
        return {**known, "widths": {}, "costs": of_dynamic(row["costs"], tables)}
    sub_network = SubNetwork.from_json(row["sub_network"])
    costs = {name: table.cost(sub_network) for name, table in tables.items()}
    return {**known, "widths": mean_widths(space, space.one_hot(sub_network)), "costs": costs}


# --- tables -----------------------------------------------------------------------------------------------------


def _loss_table(rows: Rows) -> Table:
    """Losses of every network on every text, and differences over all of them."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    cells = []
    for of_network in _by_network(rows):
        last = of_network[-1]
        losses = {row["text"]: f"{row['loss']:.3f}{half(row['interval'])}" for row in of_network}
        differences = [signed(last[over]) for over in ("over_full", "over_static")]
        cells.append([name_of(last), costs_of(last, ", "), *(losses.get(text, "") for text in texts), *differences])
    caption = "Losses in nats per token ± half of the 95 % interval; differences over all texts."
    return Table(["network", "cost", *texts, "over full", "over static"], cells, caption)


def _score_table(rows: Rows) -> Table:
    """Every score of every network."""
    asked = _metrics(rows)
    cells = []
    for of_network in _by_network(rows):
        found = {each: told(*score) for row in of_network for each, score in _scores(row).items()}
        # what a dynamic router costs depends on the task
        costs = " / ".join(dict.fromkeys(costs_of(row, ", ") for row in of_network))
        cells.append([name_of(of_network[0]), costs, *(found.get(each, "") for each in asked)])
    counts = {task: of["questions"] for row in rows for task, of in row["scores"].items() if of["questions"]}
    questions = ", ".join(f"{task} {count}" for task, count in counts.items())
    caption = f"Scores ± the harness's standard error. Questions: {questions or 'not said'}."
    return Table(["network", "cost", *(f"{task} {metric}" for task, metric in asked)], cells, caption)
