"""Measures the latencies of a dynamic router: mixtures of choices, through the grouped path, inside the real pass.

The static full network is measured all along and everything else as a ratio to it, as for the static table. Whole
passes are timed, and least squares finds what routing costs and what a block saves at each width: a single block's time
follows from many tokens in many groups and cannot be had alone (ours).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flextron_lit.costs.latency import HeldOut, LatencyTable, PhaseLatency, conditions
from flextron_lit.costs.mixtures import DrawnChoices, router_products, shares
from flextron_lit.costs.profiler import (
    Probe,
    measuring,
    phase_seconds,
    probe_counts,
    table_of,
    time_shares,
    timed,
)
from flextron_lit.costs.table import CostTable
from flextron_lit.costs.timing import Ratio
from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.space import ElasticSpace

MIXTURES_A_NUMBER = 2
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
        held_out: number of those mixtures; every other one differs from layer to layer; 0 leaves the check out.
        seed: which mixtures are held out.

    Returns:
        The table; its costs are means over tokens, its ratios those of the full network without routers.

    Raises:
        ValueError: if the workload does not fit in memory, or takes more positions than the model has.
    """
    count = MIXTURES_A_NUMBER * (1 + len(probe_counts(backbone.space)))
    fitted_to = [2 * index for index in range(count)]
    checked = [HELD_OUT_FROM * (1 + seed) + index for index in range(held_out)]
    phases = {}
    with measuring(backbone, workload):
        for phase in workload.phases:
            time = phase_seconds(phase, budget_seconds)
            policies = _policies(backbone, workload, phase, fitted_to)
            measured = timed(backbone, workload, phase, policies, time, "measuring")
            largest, saved = fit(backbone.space, [(policies[n].shares, r.value) for n, r in measured.ratios.items()])
            full_time, of_time = 1e3 * measured.reference, time_shares(backbone, workload, phase)
            table = table_of(backbone.space, phase, full_time, saved, of_time, largest)
            spread = max(ratio.spread for ratio in measured.ratios.values())
            policies = _policies(backbone, workload, phase, checked)
            ratios = timed(backbone, workload, phase, policies, time, "checking").ratios if checked else {}
            phases[phase] = PhaseLatency(table, spread, _rows(table, policies, ratios))
    return LatencyTable(conditions(backbone, workload, "dynamic"), phases)


def fit(space: ElasticSpace, observed: list[tuple[Tensor, float]]) -> tuple[float, dict[Probe, float]]:
    """What all blocks at full width take, and what one block saves at each other width, by least squares.

    Errors count relative to what was measured, as those of predictions do. Blocks of a kind that have a width save
    the same by it.

    Args:
        space: the choices.
        observed: shares of the choices [2L, N], and the time.

    Returns:
        Both in the unit of the times.
    """
    counts = probe_counts(space)
    rows = torch.tensor([[1.0, *_per_block(space, mixture).values()] for mixture, _ in observed], dtype=torch.float64)
    times = torch.tensor([time for _, time in observed], dtype=torch.float64)[:, None]
    # the smallest solution where mixtures leave numbers open; not every driver gives it
    found = torch.linalg.lstsq(rows / times, torch.ones_like(times), driver="gelsd").solution.flatten().tolist()
    saved = {probe: -each / counts[probe] for probe, each in zip(counts, found[1:], strict=True)}
    return found[0], saved


def _per_block(space: ElasticSpace, mixture: Tensor) -> dict[Probe, float]:
    """Share of the tokens that take each kind and width, the mean over the blocks that have it."""
    counts = probe_counts(space)
    total = dict.fromkeys(counts, 0.0)
    for block, row in zip(space.blocks, mixture.tolist(), strict=True):
        for width, share in zip(block.widths[:-1], row, strict=False):
            total[block.kind, width] += share / counts[block.kind, width]
    return total


def _policies(
    backbone: ElasticBackbone, workload: Workload, phase: Phase, numbers: list[int]
) -> dict[int, DrawnChoices]:
    """A policy for each mixture, by its number."""
    products = router_products(backbone)
    tokens = workload.prompt_tokens if phase == "prefill" else 1

    def policy(number: int) -> DrawnChoices:
        generator = torch.Generator().manual_seed(number)
        return DrawnChoices(products, shares(backbone.space, number), workload.batch_size, tokens, generator)

    return {number: policy(number) for number in numbers}


def _rows(table: CostTable, policies: Mapping[int, DrawnChoices], measured: Mapping[int, Ratio]) -> tuple[HeldOut, ...]:
    ratios = {number: float(table.expected(policy.shares)) / table.full for number, policy in policies.items()}
    return tuple(HeldOut((), ratio, measured[number].value, mixture=number) for number, ratio in ratios.items())
