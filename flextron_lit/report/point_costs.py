"""What the points of a trade-off cost: which sub-networks they are, and what tables say of those."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flextron_lit import checkpoint
from flextron_lit.checkpoint.run_folder import CONFIG, MEND, RunFolder
from flextron_lit.costs import CostTable, parameter_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.files.damage import damage
from flextron_lit.report.points import Point
from flextron_lit.space import KINDS, ElasticSpace, SubNetwork
from flextron_lit.stages.validation import DYNAMIC, FULL, STATIC, Uniform, ValidationSet, mean_widths, typical

WIDTH_SLACK = 1e-6
"""Two means of the same widths may differ by this much: they were summed in another order."""


def named(stages: Sequence[RunFolder], backbone: ElasticBackbone) -> dict[str, SubNetwork]:
    """The sub-networks that stages watch without a router, by name, as their configs say."""
    space, table = backbone.space, parameter_table(backbone)
    found: dict[str, SubNetwork] = {}
    for stage in stages:
        # of another space the same names meant others
        if checkpoint.read(stage.checkpoint).space == space:
            with damage(stage.path / CONFIG, MEND):
                found |= _watched(stage.config or {}, space, table)
    return {**found, FULL: space.full()}


def _watched(config: Mapping[str, Any], space: ElasticSpace, table: CostTable) -> dict[str, SubNetwork]:
    settings = config["model"]["init_args"].get("validation")
    if settings is None:
        # what is watched beside a router's answers
        return {each.name: space.uniform(each.mlp, each.attention) for each in typical(space)}
    uniform = settings["uniform"] and [Uniform(**each) for each in settings["uniform"]]
    watched = ValidationSet(uniform=uniform, random_costs=settings["random_costs"], seed=settings["seed"])
    return watched.resolve(space, table)


def priced(
    found: Sequence[Point],
    space: ElasticSpace,
    tables: Mapping[str, CostTable],
    sub_networks: Mapping[str, SubNetwork],
    dynamic: CostTable | None,
) -> Iterator[Point]:
    """What was validated with its costs, without answers of routers that are no longer there.

    Args:
        found: what was validated.
        space: the choices.
        tables: the costs to show.
        sub_networks: those whose names say what they are, answers of the static router among them.
        dynamic: the dynamic router's table; None without one.
    """
    for point in found:
        if point.kind == DYNAMIC:
            if dynamic is not None:
                ratio = point.own_cost / dynamic.full if point.own_ratio is None else point.own_ratio
                yield replace(point, costs=of_dynamic({dynamic.name: ratio}, tables))
            continue
        sub_network = sub_networks.get(point.name)
        if sub_network is not None and _has_widths(sub_network, point.widths, space):
            yield replace(point, costs={name: table.cost(sub_network) for name, table in tables.items()})
        elif point.kind != STATIC:
            yield point


def of_dynamic(ratios: Mapping[str, float], tables: Mapping[str, CostTable]) -> dict[str, float]:
    """What a dynamic router costs: its ratio holds on every scale of the same cost, such as another latency table's."""
    return {name: ratio * tables[name].full for name, ratio in ratios.items() if name in tables}


def _has_widths(sub_network: SubNetwork, widths: Mapping[str, float], space: ElasticSpace) -> bool:
    """Whether a name still means what was validated: the choices of a space may have changed since."""
    found = mean_widths(space, space.one_hot(sub_network))
    return all(abs(found[kind] - widths[kind]) < WIDTH_SLACK for kind in KINDS)
