"""The points of a trade-off: what a run validated, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flextron_lit.costs import CostTable, parameter_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.run_folder import RunFolder
from flextron_lit.space import KINDS, ElasticSpace, SubNetwork
from flextron_lit.validated import FULL, STATIC, Validated
from flextron_lit.validation import DYNAMIC, Uniform, ValidationSet, mean_widths, typical

WIDTH_SLACK = 1e-6
"""Two means of the same widths may differ by this much: they were summed in another order."""


@dataclass(frozen=True)
class Point:
    """One point."""

    validated: Validated
    costs: Mapping[str, float]
    """By the name of the cost, in its unit: those that are known; a dynamic router has its own cost alone."""


def named(stages: Sequence[RunFolder], backbone: ElasticBackbone) -> dict[str, SubNetwork]:
    """The sub-networks that stages watch without a router, by name, as their configs say."""
    space, table = backbone.space, parameter_table(backbone)
    found: dict[str, SubNetwork] = {}
    for stage in stages:
        config = stage.config
        assert config is not None, "a finished run has its config"
        settings = config["model"]["init_args"].get("validation")
        if settings is not None:
            found |= _validation_set(settings).resolve(space, table)
        else:
            # what is watched beside a router's answers
            found |= {each.name: space.uniform(each.mlp, each.attention) for each in typical(space)}
    return {**found, FULL: space.full()}


def _validation_set(settings: Mapping[str, Any]) -> ValidationSet:
    uniform = settings["uniform"]
    listed = None if uniform is None else [Uniform(**each) for each in uniform]
    return ValidationSet(uniform=listed, random_costs=settings["random_costs"], seed=settings["seed"])


def priced(
    found: Sequence[Validated],
    space: ElasticSpace,
    tables: Mapping[str, CostTable],
    sub_networks: Mapping[str, SubNetwork],
    dynamic: CostTable | None,
) -> Iterator[Point]:
    """Add the costs, and leave out answers of routers that are no longer there.

    Args:
        found: what was validated.
        space: the choices.
        tables: the costs to show.
        sub_networks: those whose names say what they are, answers of the static router among them.
        dynamic: the dynamic router's table; None without one.
    """
    for each in found:
        if each.kind == DYNAMIC:
            if dynamic is not None:
                yield Point(each, _of_dynamic(each, tables, dynamic))
            continue
        sub_network = sub_networks.get(each.name)
        if sub_network is not None and _has_widths(sub_network, each.widths, space):
            yield Point(each, {name: table.cost(sub_network) for name, table in tables.items()})
        elif each.kind != STATIC:
            yield Point(each, {})


def _of_dynamic(each: Validated, tables: Mapping[str, CostTable], dynamic: CostTable) -> dict[str, float]:
    """Its ratio holds on every scale of the same cost, such as that of another latency table."""
    table = tables.get(dynamic.name)
    return {} if table is None else {dynamic.name: each.own_cost / dynamic.full * table.full}


def _has_widths(sub_network: SubNetwork, widths: Mapping[str, float], space: ElasticSpace) -> bool:
    """Whether a name still means what was validated: the choices of a space may have changed since."""
    found = mean_widths(space, space.one_hot(sub_network))
    return all(abs(found[kind] - widths[kind]) < WIDTH_SLACK for kind in KINDS)
