"""The parts of docs/results.md that are of small Llamas, from benchmarks/results/ladder.json and ablations.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

from results import measured_by, read, table

SIZES = ("0.25", "0.5", "0.75", "1")
LADDER, NESTED = "end to end", "nested"
WAYS = {"own projections": "Flextron, own projections", "all weights": "Flextron, all weights"}
"""In the file, and as readers know them."""
SHARES = ("0.9", "0.75", "0.6", "0.45")
BASE = "base"
Losses = Mapping[str, float]


def by_seed(rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by name, then by seed."""
    found: dict[str, dict[str, Any]] = {}
    for cell, row in rows.items():
        name, _, seed = cell.rpartition("seed ")
        found.setdefault(name.removesuffix(", "), {})[seed] = row
    return found


def spread(values: Sequence[float], signed: bool = False) -> str:
    """Mean, and the range if there is one."""
    form = "+.3f" if signed else ".3f"
    mean = format(fmean(values), form)
    return f"{mean} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else mean


# --- the ladder ---------------------------------------------------------------------------------------------------


def ladder() -> dict[str, Any]:
    """Networks trained end to end, and by how much sub-networks of the same size lose more; empty where unmeasured."""
    found = read("ladder")
    rungs = by_seed(found.get(LADDER, {}))
    whole = [*(rungs.get(size, {}) for size in SIZES), *by_seed(found.get(NESTED, {})).values()]
    # a seed counts once all of it is there, and the nested network comes last
    seeds = sorted(set.intersection(*map(set, whole)))
    if NESTED not in found or not seeds:
        return {}
    head = ["network", "tokens", *(f"{rungs[size][seeds[0]]['parameters'] / 1e6:.2f}M" for size in SIZES)]
    tokens = found["settings"]["tokens"]
    first = ["each size end to end", f"{tokens:,} each", *(spread([rungs[s][n]["loss"] for n in seeds]) for s in SIZES)]
    alike, answered = (list(_gaps(found, rungs, seeds, kind)) for kind in ("losses", "answered"))
    return {
        "tokens": tokens,
        "seeds": len(seeds),
        "alike": table(head, [first, *alike]),
        "answered": table(head, [first, *answered]),
        "monotone": monotone({seed: [rungs[size][seed]["loss"] for size in SIZES] for seed in seeds}),
        "about": measured_by(found),
    }


def _gaps(
    found: Mapping[str, Any], rungs: Mapping[str, Any], seeds: Sequence[str], kind: str
) -> Iterable[Sequence[str]]:
    """A row a training: nats more than the ladder's network of that size."""
    for way in (NESTED, *WAYS):
        for part, rows in by_seed(found.get(way, {})).items():
            if not set(seeds) <= set(rows) or kind not in rows[seeds[0]]:
                continue
            spent, gaps = rows[seeds[0]]["tokens"], []
            for size in SIZES:
                losses = [rows[seed][kind][size] - rungs[size][seed]["loss"] for seed in seeds]
                gaps.append(spread(losses, signed=True))
            if way == NESTED:
                yield ["nested from the start", f"{spent:,}", *gaps]
            else:
                yield [f"{WAYS[way]}, {float(part):.4g} of N", f"{spent:,} more", *gaps]


def monotone(losses: Mapping[str, Sequence[float]]) -> str:
    """Whether each larger network is the better one, in words.

    Args:
        losses: by seed, from the smallest network to the largest.
    """
    falling = [seed for seed, own in losses.items() if _falls(own)]
    if len(falling) == len(losses):
        return "Each larger network of the ladder is the better one, in every seed."
    if _falls([fmean(own) for own in zip(*losses.values(), strict=True)]):
        return (
            f"Each larger network of the ladder is the better one in the mean of the seeds; within a seed in "
            f"{len(falling)} of {len(losses)}."
        )
    return "Not every larger network of the ladder is better than the smaller one: its gaps say little."


def _falls(losses: Sequence[float]) -> bool:
    return all(larger < smaller for smaller, larger in pairwise(losses))


# --- ablations ----------------------------------------------------------------------------------------------------


def ablations() -> dict[str, Any]:
    """What each change of the base loses; empty where unmeasured."""
    found = read("ablations")
    base = by_seed(found.get(BASE, {}))
    if not base:
        return {}
    ((name, rows),) = base.items()
    kinds = [kind for kind, of_kind in found.items() if kind not in ("settings", "about", BASE) and of_kind]
    groups = {kind: _named(found[kind]) for kind in kinds}
    cells = [_cells(BASE, name, rows, None)]
    for kind, cases in groups.items():
        cells += [_cells(kind, case, of_seeds, rows) for case, of_seeds in cases.items()]
    head = ["what", "how", *SHARES, "mean against the base"]
    return {
        "table": table(head, cells),
        "converted": table(["how", *SHARES], _converted(found, [BASE, *kinds])),
        "seeds": len(rows),
        "about": measured_by(found),
    }


def _named(rows: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By case, then by seed; where a cell holds several cases (joint tuning), each by its own name."""
    found: dict[str, dict[str, Any]] = {}
    for case, of_seeds in by_seed(rows).items():
        for seed, row in of_seeds.items():
            for name, each in ({case: row} if "losses" in row else row).items():
                found.setdefault(name, {})[seed] = each
    return found


def _cells(kind: str, case: str, rows: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[str]:
    means = [fmean(row["losses"][share] for row in rows.values()) for share in SHARES]
    against = ""
    if base is not None:
        against = spread([_mean(row) - _mean(base[seed]) for seed, row in rows.items() if seed in base], signed=True)
    return [kind, case, *(f"{mean:.3f}" for mean in means), against]


def _converted(found: Mapping[str, Any], kinds: Sequence[str]) -> Iterable[list[str]]:
    """What conversion alone gives, a row a way of it."""
    told: list[Losses] = []
    for kind in kinds:
        for case, of_seeds in _named(found[kind]).items():
            before = next((row["before"] for row in of_seeds.values() if "before" in row), None)
            # what only trains otherwise begins alike
            if before and before not in told:
                told.append(before)
                yield [case, *(f"{before[share]:.3f}" for share in SHARES)]


def _mean(row: Mapping[str, Any]) -> float:
    return fmean(row["losses"][share] for share in SHARES)
