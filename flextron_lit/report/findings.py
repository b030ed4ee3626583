"""What a report shows of a network, from the files of its run: points, ladder, and the costs of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flextron_lit.costs import CostTable, Workload
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.latency.latency_table import LatencyTable, origin_of, read_all
from flextron_lit.report.charts import noun
from flextron_lit.report.point_costs import named, priced
from flextron_lit.report.points import LOSS, Measure, Point, validated
from flextron_lit.report.reported_folder import Source
from flextron_lit.routers.in_force import in_force
from flextron_lit.routers.staleness import stale_note
from flextron_lit.routers.trained import KeptRouter, TrainedDynamicRouter, TrainedRouter
from flextron_lit.space import ElasticSpace
from flextron_lit.stages.validation import STATIC
from flextron_lit.stages.watched_losses import ladder_answers

AXES = ("latency", "parameters", "flops", "kv_bytes")
"""Costs that a trade-off is shown against, in this order, where they are known."""
FADED = "Faded points were validated before a later stage changed the weights; do not compare them with the others."
Router = TypeVar("Router", bound=KeptRouter)


@dataclass(frozen=True)
class Findings:
    """All of it."""

    space: ElasticSpace
    tables: dict[str, CostTable]
    """The costs to show, by name; the static router's own comes first."""
    measured: LatencyTable | None
    """Where latencies come from, and the request that costs are those of; None where none were measured."""
    static: TrainedRouter | None
    """Whose ladder is shown."""
    dynamic: TrainedDynamicRouter | None
    points: list[Point]
    """What was validated."""
    notes: list[str]
    """What a reader should know of it."""

    @property
    def validation(self) -> list[Measure]:
        """The losses of the points; nothing, where nothing was validated."""
        return [Measure("loss, validation", LOSS, self.points)] if self.points else []

    def shown(self, costs: Mapping[str, float]) -> dict[str, str]:
        """Costs at a glance, by name."""
        return {name: self.tables[name].short(cost) for name, cost in costs.items()}


def gather(source: Source, backbone: ElasticBackbone, latency: str | None = None) -> Findings:
    """Read it.

    Args:
        source: where the files lie.
        backbone: the network, or one of its shape without weights.
        latency: name of the latency table to use; None means the static router's, or the first.

    Raises:
        ValueError: if a file is damaged, or there is no latency table of that name.
    """
    space, notes = backbone.space, list[str]()
    folder = source.checkpoint
    static = _current(TrainedRouter.read_all(folder, space), "static router", folder, space, notes)
    dynamic = _current(TrainedDynamicRouter.read_all(folder, space), "dynamic router", folder, space, notes)
    name = latency or _latency_name(folder, space, static, notes)
    known, measured = known_tables(folder, backbone, Workload(), name)
    tables = {each: known[each] for each in AXES if each in known}
    if static is not None:
        own = {static.table.name: static.table}
        if tables.get(static.table.name, static.table).sha256 != static.table.sha256:
            notes.append(f"Not of the request above, but as the router was trained for: {noun(static.table.name)}.")
        # its own come first, in the table that its ladder was made for
        tables = own | tables | own
    found = validated(source.stages)
    sub_networks = named(source.stages, backbone)
    if static is not None:
        budgets = [each.budget for each in found if each.kind == STATIC and isinstance(each.budget, float)]
        sub_networks |= ladder_answers(static.ladder, static.table, budgets)
    points = list(priced(found, space, tables, sub_networks, dynamic.table if dynamic else None))
    if any(point.earlier for point in points):
        notes.append(FADED)
    return Findings(space, tables, measured, static, dynamic, points, notes)


def _current(
    routers: Sequence[Router], what: str, folder: Path, space: ElasticSpace, notes: list[str]
) -> Router | None:
    """The first that knows the network and its latencies as they are; notes say what of the others is not shown."""
    current = in_force(routers, folder, space)
    names = {router.name for router in current}
    for router in routers:
        if router.name not in names:
            notes.append(f"Not shown: the {what} {router.name}, whose latency table is no longer there.")
    routers = current
    fresh = [router for router in routers if not router.stale]
    for router in routers:
        if router.stale:
            notes.append(f"Not shown: {stale_note(f'the {what} for {router.table.name}', router.stale)}.")
    for router in fresh[1:]:
        notes.append(f"Not shown: a second {what}, {router.name}.")
    return fresh[0] if fresh else None


def _latency_name(folder: Path, space: ElasticSpace, static: TrainedRouter | None, notes: list[str]) -> str | None:
    """The latency table to show, of whatever device: the static router's, else the first; None where there is none."""
    names = [path.stem for path in read_all(folder, space)]
    own = None if static is None else origin_of(folder, space, static.table)
    if own is not None and own[0].stem in names:
        return own[0].stem
    if len(names) > 1:
        notes.append(f"Latencies are those of {names[0]}; --latency shows another one: {', '.join(names[1:])}.")
    return names[0] if names else None
