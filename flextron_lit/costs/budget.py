"""Budgets as people write them, and whether a sub-network meets one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flextron_lit.costs import CostTable
from flextron_lit.space import SubNetwork

SUFFIXES = {
    "ms": {"ms": 1.0, "s": 1e3, "us": 1e-3},
    "parameters": {"K": 1e3, "M": 1e6, "B": 1e9},
    "bytes": {"KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "FLOPs": {"MFLOPs": 1e6, "GFLOPs": 1e9, "TFLOPs": 1e12},
}
"""What a number may be followed by, for every unit of the cost tables, and how many of it that is."""
UNITS = {suffix: (unit, size) for unit, sizes in SUFFIXES.items() for suffix, size in sizes.items()}
MEANT = {"ms": "latency", "parameters": "parameters", "bytes": "memory", "FLOPs": "flops"}
"""Which cost a bare number with a unit means: of times, the whole request."""
ALIASES = {"request": "latency"}
TERM = re.compile(r"(?:(?P<name>[a-z_]+)\s*(?:<=|=)\s*)?(?P<number>[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")
HELP = (
    "A ratio of the full network's cost (0.6): of the cost that the checkpoint's router is for, else latency, else "
    "FLOPs. Or a number with a unit: 2s or 1800ms (a whole request), 90M (parameters), 400MB (weights and KV cache), "
    "50GFLOPs. Or NAME=VALUE, with a name among latency, prefill, decode, parameters, flops, prefill_flops, "
    "decode_flops, kv_bytes, memory: decode=12ms. Or several, separated by commas: latency<=0.6,kv_bytes<=0.5."
)


@dataclass(frozen=True)
class Limit:
    """One condition of a budget: a cost that a sub-network must not exceed."""

    table: CostTable
    value: float
    """In the table's unit."""
    text: str
    """As the user wrote it."""

    def allows(self, sub_network: SubNetwork) -> bool:
        """Whether a sub-network costs no more."""
        return self.table.cost(sub_network) <= self.value

    @property
    def loose(self) -> bool:
        """Whether the full network meets it."""
        return self.value >= self.table.full


Limits = Sequence[Limit]


def meets(sub_network: SubNetwork, limits: Limits) -> bool:
    """Whether a sub-network exceeds no limit."""
    return all(limit.allows(sub_network) for limit in limits)


def parse_budget(budget: str, tables: Mapping[str, CostTable], ratio_of: str | None = None) -> list[Limit]:
    """Read a budget.

    Args:
        budget: see `HELP`.
        tables: every cost that is known, by name.
        ratio_of: the cost that a ratio without a name is of; None means `latency`, or `flops` where it is not known.

    Raises:
        ValueError: if it cannot be read, names a cost that is not known, or is below the smallest cost possible; the
            message says what there is, or how small that is.
    """
    terms = [term.strip() for term in budget.split(",")]
    limits = [_limit(term, tables, ratio_of) for term in terms]
    for limit in limits:
        smallest = limit.table.smallest
        if limit.value < smallest:
            raise ValueError(
                f"no sub-network meets {limit.text!r}: the smallest {limit.table.name} possible is "
                f"{limit.table.show(smallest)} ({limit.table.smallest_ratio:.3f} of the full network's "
                f"{limit.table.show(limit.table.full)})"
            )
    return limits


def _limit(term: str, tables: Mapping[str, CostTable], ratio_of: str | None) -> Limit:
    found = TERM.fullmatch(term)
    if not found:
        raise ValueError(f"cannot read the budget {term!r}. {HELP}")
    name, number, unit = found["name"], float(found["number"]), found["unit"]
    if unit and unit not in UNITS:
        raise ValueError(f"the budget {term!r} has the unit {unit!r}; known are {', '.join(UNITS)}")
    if not number:
        raise ValueError(f"the budget {term!r} must be above 0")
    meant, factor = UNITS[unit] if unit else (None, 1.0)
    if name is None:
        name = MEANT[meant] if meant else ratio_of or ("latency" if "latency" in tables else "flops")
    name = ALIASES.get(name, name)
    if name not in tables:
        hint = "; measure latencies with `python main.py profile`" if name in ("latency", "prefill", "decode") else ""
        raise ValueError(f"the budget {term!r} is one of {name}, but known costs are {', '.join(tables)}{hint}")
    table = tables[name]
    if meant is None:
        return Limit(table, number * table.full, term)
    if meant != table.unit:
        raise ValueError(f"the budget {term!r} is in {meant}, but {table.name} is counted in {table.unit}")
    return Limit(table, number * factor, term)
