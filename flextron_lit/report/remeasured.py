"""What budgets of a latency take when they are measured once more, beside what was promised."""

from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.costs import CostTable, Workload
from flextron_lit.elastic.selection import Selection
from flextron_lit.latency.latency_table import LatencyTable
from flextron_lit.latency.miss import PROMISED, points
from flextron_lit.latency.request import REQUEST, measure_request
from flextron_lit.latency.timing import Ratio
from flextron_lit.stages.validation import FULL

SECONDS = 120.0
"""At most, for all rows; a few rounds run however long they take."""
ENOUGH = 0.01
"""Spread of a ratio that is small enough to say whether a budget is met within `PROMISED`."""
NOTED = 0.1
"""How much faster or slower a machine may be than it was before that is said: ratios hold, milliseconds do not."""
Row = dict[str, Any]


def add_latencies(
    rows: Sequence[Row],
    loaded: Loaded,
    selections: Mapping[str, Selection],
    promised: Mapping[str, CostTable],
    measured: LatencyTable | None,
) -> None:
    """Measure what the rows stand for, all in turn beside the full network, and add what they take.

    Milliseconds are ratios times the full network's time in the latency table, wherever there is one: so that all that
    is said of a checkpoint has one scale, whatever the machine's speed is at the moment.

    Args:
        rows: of the summary, the full network's among them.
        loaded: the network.
        selections: by the names of the rows.
        promised: the latency that budgets of a kind of router are of; those of other costs promised none.
        measured: the table that the routers' latencies come from; None if it is no longer there.
    """
    workload = measured.workload if measured else Workload()
    others = {row["name"]: selections[row["name"]] for row in rows if row["name"] != FULL}
    text = mixed_text(loaded, workload)
    # in the mode that the budgets are of
    loaded.backbone.compile_widths(measured is not None and measured.compiled)
    found = measure_request(loaded.backbone, workload, lambda _: others, SECONDS, text, until=ENOUGH)
    full = measured.tables()[REQUEST].full if measured else 1e3 * found.full
    for row in rows:
        exact = Ratio(1.0, 0.0)
        ratio = found.ratios[REQUEST].get(row["name"], exact)
        row |= {"latency_ms": ratio.value * full, "latency_ratio": ratio.value, "latency_spread": ratio.spread}
        cost = promised.get(row["router"])
        if row["name"] == FULL:
            row["latency_pace"] = 1e3 * found.full / full
        if cost is not None:
            own = found.ratios[cost.name][row["name"]]
            row |= {"budget_ratio": own.value, "budget_spread": own.spread, "over_budget": own.value - row["budget"]}


def mixed_text(loaded: Loaded, workload: Workload) -> Tensor:
    """The beginnings of each domain's first validation block one after the other, [B, T]; repeated if too short."""
    documents = loaded.held_out("validation", loaded.known_text["block_size"])
    blocks = [batches[0]["input_ids"][0] for batches in documents.values()]
    each = ceil(workload.total_tokens / len(blocks))
    text = torch.cat([block[:each] for block in blocks])
    times = ceil(workload.total_tokens / len(text))
    return text.repeat(times)[: workload.total_tokens].expand(workload.batch_size, -1)


def told(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Whether latency budgets were met when measured again, and plainly which were not; nothing of other budgets."""
    budgets = [row for row in rows if "over_budget" in row]
    if not budgets:
        return
    pace = next((row["latency_pace"] for row in rows if "latency_pace" in row), 1.0)
    if abs(pace - 1) > NOTED:
        yield f"All took {pace:.2f} times as long as when the latency table was measured; milliseconds are of then."
    missed = [row for row in budgets if row["over_budget"] - row["budget_spread"] > PROMISED]
    for row in missed:
        over = row["over_budget"]
        yield (
            f"Missed: measured again, the {row['router']} answer to {row['budget']:g} of the {row['cost']} takes "
            f"{row['budget_ratio']:.3f} ± {row['budget_spread']:.3f} of the full network's, {points(over)} more; on "
            f"this machine as it is now, ask for {row['budget'] - over:.2f}."
        )
    if not missed:
        most = max(row["over_budget"] for row in budgets)
        over = f"is exceeded by more than {points(most)} of the full network's" if most > 0 else "is exceeded"
        yield f"Measured again, no latency budget {over}."


def ratio_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a row's measured latency to the full network's; None where none was measured."""
    if "latency_ms" not in row:
        return None
    full = next((each["latency_ms"] for each in rows if each["name"] == FULL), None)
    # earlier releases wrote no ratio
    return row.get("latency_ratio", row["latency_ms"] / full if full else None)
