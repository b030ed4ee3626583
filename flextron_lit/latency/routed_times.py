"""Measures the latencies of a dynamic router: mixtures of choices, through the grouped path, inside the real pass.

The static full network is measured all along and everything else as a ratio to it, as for the static table. Whole
passes are timed, and least squares finds what routing costs, what a block saves at each width, and what it costs to
sort the tokens of blocks that choose differently: a single block's time follows from many tokens in many groups and
cannot be had alone (ours). The table counts as many blocks to sort as a trained router has.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch
from torch import Tensor

from flextron_lit.costs.table import CostTable
from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.latency.block_times import Probe, measure, phase_seconds, probe_counts, table_of, time_shares
from flextron_lit.latency.correction import corrected
from flextron_lit.latency.latency_table import HeldOut, LatencyTable, PhaseLatency, conditions
from flextron_lit.latency.mixtures import DrawnChoices, like_trained, router_products, shares
from flextron_lit.space import ElasticSpace

MIXTURES_A_NUMBER = 3
"""Mixtures that are measured for each number that least squares finds."""
HELD_OUT_FROM = 10_000
"""Number of the first mixture that is held out; twice the number of a measured one stays below."""


def profile_dynamic(
    backbone: ElasticBackbone, workload: Workload, *, budget_seconds: float = 60.0, held_out: int = 20, seed: int = 0
) -> LatencyTable:
    """Measure the latency table of a dynamic router, and its error on mixtures that it was not made from.

    Args:
        backbone: the elastic network, on the device to measure and in the workload's dtype; values do not matter.
        workload: the request to measure.
        budget_seconds: time for the table; the check on held-out mixtures takes about as much again.
        held_out: number of those mixtures, like a trained router's; every other one differs from layer to layer; 0
            leaves the check out.
        seed: which mixtures are held out.

    Returns:
        The table; its costs are means over tokens, its ratios those of the full network without routers.

    Raises:
        ValueError: if the workload does not fit in memory, or takes more positions than the model has.
    """
    count = MIXTURES_A_NUMBER * (2 + len(probe_counts(backbone.space)))
    fitted_to = [2 * index for index in range(count)]
    checked = held_out_numbers(held_out, seed)
    space, phases = backbone.space, {}
    for phase in workload.phases:
        time = phase_seconds(phase, budget_seconds)
        policies = policies_of(backbone, workload, phase, fitted_to)
        found = measure(backbone, workload, phase, policies, time)
        law = fit(space, [Observed(policies[n].shares, policies[n].mixed, r.value) for n, r in found.ratios.items()])
        # random mixtures leave more blocks to sort than a trained router does
        typical = mean(policy.mixed for number, policy in policies.items() if like_trained(number))
        largest, of_time = law.largest + law.sorting * typical, time_shares(backbone, workload, phase)
        parts = space, phase, 1e3 * found.reference, law.saved, of_time, largest
        table = table_of(*parts)
        spread = max(ratio.spread for ratio in found.ratios.values())
        policies = policies_of(backbone, workload, phase, checked)
        ratios = measure(backbone, workload, phase, policies, time, title="checking").ratios if policies else {}
        observed = [(expected_ratio(table, policies[number]), ratios[number].value) for number in checked]
        factor, predicted = corrected(observed, largest)
        rows = (HeldOut((), p, ratios[n].value, mixture=n) for n, p in zip(checked, predicted, strict=True))
        phases[phase] = PhaseLatency(table_of(*parts, factor=factor), spread, tuple(rows), factor)
    return LatencyTable(conditions(backbone, workload, "dynamic"), phases)


def held_out_numbers(count: int, seed: int) -> list[int]:
    """Numbers of mixtures that no table is made from, like a trained router's; those of two seeds differ."""
    return list(itertools.islice(filter(like_trained, itertools.count(HELD_OUT_FROM * (1 + seed))), count))


def expected_ratio(table: CostTable, policy: DrawnChoices) -> float:
    """What a table says of a mixture, relative to the full network."""
    return float(table.expected(policy.shares)) / table.full


@dataclass(frozen=True)
class Observed:
    """The time of a mixture."""

    shares: Tensor
    """Of the choices, [2L, N]."""
    mixed: float
    """Share of the blocks whose tokens choose differently."""
    time: float


@dataclass(frozen=True)
class Law:
    """What mixtures take, in the unit of the times."""

    largest: float
    """All blocks at full width, none to sort."""
    sorting: float
    """More, where the tokens of every block choose differently."""
    saved: dict[Probe, float]
    """By one block at each other width."""


def fit(space: ElasticSpace, observed: Sequence[Observed]) -> Law:
    """The law of some times, by least squares.

    Errors count relative to what was measured, as those of predictions do. Blocks of a kind that have a width save
    the same by it.

    Args:
        space: the choices.
        observed: mixtures and times.
    """
    counts = probe_counts(space)
    known = [[1.0, each.mixed, *_per_block(space, each.shares).values()] for each in observed]
    times = torch.tensor([each.time for each in observed], dtype=torch.float64)[:, None]
    rows = torch.tensor(known, dtype=torch.float64) / times
    # the smallest solution where mixtures leave numbers open; not every driver gives it
    largest, sorting, *rest = (
        torch.linalg.lstsq(rows, torch.ones_like(times), driver="gelsd").solution.flatten().tolist()
    )
    saved = {probe: -each / counts[probe] for probe, each in zip(counts, rest, strict=True)}
    return Law(largest, sorting, saved)


def _per_block(space: ElasticSpace, mixture: Tensor) -> dict[Probe, float]:
    """Share of the tokens that take each kind and width, the mean over the blocks that have it."""
    counts = probe_counts(space)
    total = dict.fromkeys(counts, 0.0)
    for block, row in zip(space.blocks, mixture.tolist(), strict=True):
        for width, share in zip(block.widths[:-1], row, strict=False):
            total[block.kind, width] += share / counts[block.kind, width]
    return total


def policies_of(
    backbone: ElasticBackbone, workload: Workload, phase: Phase, numbers: list[int]
) -> dict[int, DrawnChoices]:
    """A policy for each mixture, by its number."""
    products, tokens = router_products(backbone), workload.tokens(phase)

    def policy(number: int) -> DrawnChoices:
        generator = torch.Generator().manual_seed(number)
        return DrawnChoices(products, shares(backbone.space, number), workload.batch_size, tokens, generator)

    return {number: policy(number) for number in numbers}
