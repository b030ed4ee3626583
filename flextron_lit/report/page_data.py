"""The report's data, JSON-able: what its charts draw, and what scripts can read from the page."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flextron_lit.files.whole_file import finite
from flextron_lit.report import charts
from flextron_lit.report.findings import Findings
from flextron_lit.report.points import POINT_KINDS, Measure, Point
from flextron_lit.routers.trained import TrainedRouter

FADED_OPACITY = 0.35
START = 0.7
"""The budget that the slider starts at, or the nearest."""


def to_json(
    findings: Findings, measures: Sequence[Measure], summary: Sequence[Mapping[str, Any]], history: Sequence[Any]
) -> dict[str, Any]:
    """All of it.

    Args:
        findings: costs and ladder.
        measures: what costs are traded for; the first is shown first.
        summary: rows of `summary.json`, if there are any.
        history: of the checkpoint.
    """
    tables = findings.tables
    there = {point.kind for measure in measures for point in measure.points}
    kinds = [kind for kind in POINT_KINDS if kind in there]
    return {
        "summary": list(summary),
        "measures": [
            {**vars(measure), "points": [_point(point, findings) for point in measure.points]} for measure in measures
        ],
        "ladder": None if findings.static is None else _ladder(findings.static, findings),
        "blocks": findings.space.to_json(),
        "nouns": {name: charts.noun(name) for name in tables},
        "charts": {
            "trade_off": {name: charts.trade_off(table, kinds) for name, table in tables.items()},
            "widths": charts.width_map(),
        },
        "history": list(history),
    }


def _point(point: Point, findings: Findings) -> dict[str, Any]:
    low, high = point.interval or (None, None)
    return {
        "name": point.name,
        "kind": point.kind,
        "budget": point.budget,
        "value": point.value,
        "low": low,
        "high": high,
        "said": f"{point.value:.3f}" + (f" ({low:.3f} to {high:.3f})" if point.interval else ""),
        "losses": point.losses,
        "costs": point.costs,
        "shown": findings.shown(point.costs),
        "about": ", ".join(f"{domain} {loss:.3f}" for domain, loss in point.losses.items()),
        "widths": ", ".join(f"{kind} {width:.0%}" for kind, width in point.widths.items()),
        "source": point.source,
        "opacity": FADED_OPACITY if point.earlier else 1,
    }


def _ladder(router: TrainedRouter, findings: Findings) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for rung in router.ladder.rungs:
        costs = {name: table.cost(rung.sub_network) for name, table in findings.tables.items()}
        rows.append(
            {
                "ratio": rung.cost / router.table.full,
                "loss": rung.loss,
                "choices": rung.sub_network.to_json(),
                "costs": costs,
                "shown": findings.shown(costs),
                "ratios": {name: cost / findings.tables[name].full for name, cost in costs.items()},
            }
        )
    start = min(range(len(rows)), key=lambda index: abs(rows[index]["ratio"] - START))
    losses = "measured" if router.ladder.measured else "predicted"
    return {"cost": router.table.name, "losses": losses, "start": start, "rungs": rows}


def embedded(data: Any) -> str:
    """JSON that is safe inside a `script` element; a number that is none, such as the loss of no token, is null."""
    return json.dumps(finite(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
