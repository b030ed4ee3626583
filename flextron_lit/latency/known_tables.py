"""Every cost of a network by name: the counted ones, and the latencies that were measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flextron_lit.costs.counted import COUNTED
from flextron_lit.costs.dynamic import DYNAMIC_COUNTED
from flextron_lit.costs.table import CostTable
from flextron_lit.costs.workload import Workload
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.latency.device import device_description
from flextron_lit.latency.latency_table import COMPILED, Execution, LatencyTable, read_all


def known_tables(
    folder: Path,
    backbone: ElasticBackbone,
    workload: Workload,
    latency: str | None,
    device: torch.device | None = None,
    execution: Execution = "static",
    compiled: bool = False,
) -> tuple[dict[str, CostTable], LatencyTable | None]:
    """The cost tables of a Flextron checkpoint.

    Args:
        folder: the Flextron checkpoint.
        backbone: its network, or one of its shape without weights.
        workload: what FLOPs, cache and memory are counted for, where no latency table says so.
        latency: name of the latency table to use, of whatever device; None means the only one there is, of this one.
        device: where the network will run; None means where it is.
        execution: `static` for sub-networks; `dynamic` for a dynamic router, without costs that no choice changes.
        compiled: whether the network runs by compiled code, whose latencies are others.

    Raises:
        ValueError: if there are several latency tables to choose from, none of that name, or only
            another device's or those of the other mode.
    """
    measured = {path.stem: table for path, table in read_all(folder, backbone.space, execution).items()}
    here = {"device": device_description(device or backbone.model.device), COMPILED: compiled or None}
    chosen = _chosen(measured, latency, here)
    counted_for = chosen.workload if chosen else workload
    known = COUNTED if execution == "static" else DYNAMIC_COUNTED
    counted = {name: count(backbone, counted_for) for name, count in known.items()}
    return {**(chosen.tables() if chosen else {}), **counted}, chosen


def _chosen(measured: Mapping[str, LatencyTable], name: str | None, here: Mapping[str, Any]) -> LatencyTable | None:
    if name is not None:
        if name not in measured:
            there = ", ".join(measured) or "none: measure one with `python main.py profile`"
            raise ValueError(f"there is no latency table {name!r}; there are {there}")
        return measured[name]
    fitting = {
        name: table
        for name, table in measured.items()
        if table.conditions["device"] == here["device"] and table.compiled == bool(here[COMPILED])
    }
    if len(fitting) > 1:
        raise ValueError(f"there are several latency tables; choose one with --latency: {', '.join(fitting)}")
    if measured and not fitting:
        name, table = next(iter(measured.items()))
        try:
            table.check(here)
        except ValueError as error:
            raise ValueError(f"{error}, or take it all the same with --latency {name}") from error
    return next(iter(fitting.values()), None)
