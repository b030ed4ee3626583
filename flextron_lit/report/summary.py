"""What a pipeline ends with: one table of what each budget gets, and what it costs and loses, static and dynamic."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flextron_lit.checkpoint import RECORD
from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.costs import parameter_table
from flextron_lit.elastic.selection import Selection
from flextron_lit.files.damage import read_rows
from flextron_lit.files.whole_file import write_csv, write_json
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.latency_table import origin_of
from flextron_lit.report.points import validated
from flextron_lit.report.remeasured import Row, add_latencies, ratio_of, told
from flextron_lit.routers.in_force import in_force
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter
from flextron_lit.space import SubNetwork
from flextron_lit.stages.validation import DYNAMIC, FULL, STATIC
from flextron_lit.stages.watched_losses import dynamic_answers, ladder_answers
from flextron_lit.terminal.console import short, show, table

SUMMARY = "summary.json"


def summarise(stages: Sequence[RunFolder], folder: Path) -> None:
    """Print the table, and write it as `summary.csv` and `summary.json`; what is written already is shown again.

    Losses and widths are those of the last validation of the last stage that watched a router; where its budgets are of
    a latency, the last checkpoint's answers are measured once more, against the full network, and misses are said.

    Args:
        stages: run folders of the finished stages, in order.
        folder: where to write.
    """
    written, checkpoint = folder / SUMMARY, stages[-1].checkpoint
    if written_since(written, checkpoint):
        rows = read_rows(written)
    else:
        rows = answered(stages)
        if rows:
            rows = with_costs(rows, load_elastic(str(checkpoint), device=device_of(None, checkpoint)))
            write(rows, folder)
    if rows:
        show(shown(rows), *told(rows), f"wrote {folder / 'summary.csv'}")


def written_since(file: Path, checkpoint: Path) -> bool:
    """Whether a file is there and was written after a Flextron checkpoint was made."""
    return file.is_file() and file.stat().st_mtime >= (checkpoint / RECORD).stat().st_mtime


def answered(stages: Sequence[RunFolder]) -> list[Row]:
    """The full network and every router's answers, as validated last; none where no router was validated."""
    found = validated(stages)
    rows = [
        {
            "name": each.name,
            "budget": 1.0 if each.budget is None else each.budget,
            "router": each.router,
            "losses": dict(each.losses),
            **{f"{kind}_width": each.widths[kind] for kind in ("mlp", "attention")},
        }
        for each in found
        if each.router or each.name == FULL
    ]
    if not any(row["router"] for row in rows):
        return []
    return sorted(rows, key=lambda row: (-row["budget"], row["router"]))


def with_costs(rows: list[Row], loaded: Loaded) -> list[Row]:
    """Add parameters; and the latency, measured, where budgets are of one."""
    loaded.backbone.model.eval()
    space, folder = loaded.backbone.space, loaded.folder
    static = [r for r in in_force(TrainedRouter.read_all(folder, space), folder, space) if not r.stale]
    dynamic = [r for r in in_force(TrainedDynamicRouter.read_all(folder, space), folder, space) if not r.stale]
    timed = [router for router in (*static[:1], *dynamic[:1]) if router.table.unit == "ms"]
    origins = {router.kind: origin_of(folder, space, router.table) for router in timed}
    measured = next((origin[1] for origin in origins.values() if origin is not None), None)
    if measured is not None:
        # as the table was made: in another type everything takes other times
        loaded.backbone.model.to(getattr(torch, measured.workload.dtype))
    selections: dict[str, Selection] = {FULL: space.full()}
    if static:
        selections |= ladder_answers(static[0].ladder, static[0].table, _budgets(rows, STATIC))
    if dynamic:
        selections |= dynamic_answers(dynamic[0], _budgets(rows, DYNAMIC), loaded.backbone.model)
    costs = {router.kind: router.table for router in (*static[:1], *dynamic[:1])}
    # a router that a later stage made stale answers for a network that is no more
    rows = [row for row in rows if row["name"] in selections]
    parameters = parameter_table(loaded.backbone)
    for row in rows:
        row["cost"] = costs[row["router"]].name if row["router"] in costs else ""
        selection = selections[row["name"]]
        # a dynamic router may give a token any width: it needs all parameters
        row["parameters"] = round(parameters.cost(selection if isinstance(selection, SubNetwork) else space.full()))
    if timed:
        # of another request nothing is measured here
        same = {
            kind for kind, origin in origins.items() if origin and measured and origin[1].workload == measured.workload
        }
        add_latencies(rows, loaded, selections, {kind: costs[kind] for kind in same}, measured)
    return rows


def _budgets(rows: Iterable[Row], router: str) -> list[float]:
    return [row["budget"] for row in rows if row["router"] == router]


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """`summary.json`, and the same flat in `summary.csv`."""
    flat = [{**{k: v for k, v in row.items() if k not in ("name", "losses")}, **row["losses"]} for row in rows]
    write_csv(folder / "summary.csv", flat)
    write_json(folder / SUMMARY, list(rows))


def shown(rows: Sequence[Mapping[str, Any]]) -> Table:
    """For people."""
    timed = "latency_ms" in rows[0]
    title = "what each budget gets; widths as shares, losses in nats per token on validation documents"
    # a summary that an earlier version wrote does not say
    costs = {row["name"]: row.get("cost", "") for row in rows}
    several = len({cost for cost in costs.values() if cost}) > 1
    cells = [
        (
            f"{row['budget']:.2f}",
            (row["router"] or "(full)") + f", {costs[row['name']]}" * (several and bool(row["router"])),
            f"{row['mlp_width']:.0%}",
            f"{row['attention_width']:.0%}",
            short(row["parameters"]),
            *([f"{row['latency_ms']:.0f} ms", *_again(row, rows)] if timed else []),
            *(f"{loss:.3f}" for loss in (*row["losses"].values(), fmean(row["losses"].values()))),
        )
        for row in rows
    ]
    widths = ("MLP", "attention", "parameters")
    columns = (
        "budget",
        "router",
        *widths,
        *(["latency", "of full", "over"] if timed else []),
        *rows[0]["losses"],
        "mean",
    )
    # many columns: without rules between them they fit a terminal
    narrow = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    return table(columns, cells, left=["router"], title=title, title_justify="left", **narrow)


def _again(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What was measured as a share of the full network's, and by how many points it is over a budget of a latency."""
    ratio = ratio_of(row, rows)
    if "over_budget" not in row:
        return "" if ratio is None else f"{ratio:.3f}", ""
    return f"{row['budget_ratio']:.3f}", f"{100 * row['over_budget']:+.1f}"
