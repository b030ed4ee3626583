"""How sub-networks are drawn: small callables, each with its source."""

from __future__ import annotations

import math

import torch

from flextron_lit.costs import CostTable
from flextron_lit.space import ElasticSpace, SubNetwork

TRIES = 20
MOVES_A_BLOCK = 20


def independent(space: ElasticSpace, generator: torch.Generator, uniform_share: float) -> SubNetwork:
    """Every block draws for itself (paper), or, in a share of the draws, all layers alike (ours).

    Independent draws cluster around the middle of the cost range; the uniform ones keep its corners trained.
    """
    alike = torch.rand((), generator=generator).item() < uniform_share
    return space.random_uniform(generator) if alike else space.random(generator)


def at_cost(
    space: ElasticSpace, table: CostTable, ratio: float, generator: torch.Generator, tolerance: float = 0.01
) -> SubNetwork:
    """A random sub-network whose cost is close to a ratio of the full one (ours: for sets stratified over cost).

    Draws from the distribution of largest entropy with that mean cost, `p(choice) ~ exp(-beta * cost)`, then moves
    single random blocks closer until within the tolerance: unlike rejection, it reaches every cost.

    Args:
        space: the choices.
        table: the cost that `ratio` is a ratio of.
        ratio: wanted cost in (0, 1].
        generator: source of all draws.
        tolerance: largest accepted distance of the ratio reached from the one wanted.

    Raises:
        ValueError: if no sub-network lies within the tolerance; the message names the smallest ratio.
    """
    table.check(space)
    smallest = table.ratio(space.smallest())
    if not smallest - tolerance <= ratio <= 1:
        raise ValueError(f"no sub-network costs {ratio:g} of the full {table.name}: the smallest costs {smallest:.3f}")
    beta = _solve_beta(table, ratio * table.full)
    nearest = space.full()
    for _ in range(TRIES):
        found = _move_closer(_draw(table, beta, generator), table, ratio, generator, tolerance)
        nearest = min(found, nearest, key=lambda candidate: abs(table.ratio(candidate) - ratio))
        if abs(table.ratio(nearest) - ratio) <= tolerance:
            return nearest
    raise ValueError(
        f"no sub-network within {tolerance:g} of {ratio:g} of the full {table.name}; "
        f"the nearest found costs {table.ratio(nearest):.3f}: allow a larger tolerance"
    )


def _boltzmann(costs: tuple[float, ...], beta: float) -> list[float]:
    lowest = min(beta * cost for cost in costs)
    weights = [math.exp(lowest - beta * cost) for cost in costs]
    return [weight / sum(weights) for weight in weights]


def _mean_cost(table: CostTable, beta: float) -> float:
    means = (sum(p * c for p, c in zip(_boltzmann(row, beta), row, strict=True)) for row in table.blocks)
    return table.fixed + sum(means)


def _solve_beta(table: CostTable, target: float) -> float:
    """Bisection: the mean cost falls as beta grows."""
    largest = max(row[-1] for row in table.blocks)
    low, high = -60.0 / largest, 60.0 / largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean_cost(table, middle) > target else (low, middle)
    return (low + high) / 2


def _draw(table: CostTable, beta: float, generator: torch.Generator) -> SubNetwork:
    rows = (torch.tensor(_boltzmann(row, beta)) for row in table.blocks)
    return SubNetwork(tuple(int(torch.multinomial(row, 1, generator=generator)) for row in rows))


def _move_closer(
    sub_network: SubNetwork, table: CostTable, ratio: float, generator: torch.Generator, tolerance: float
) -> SubNetwork:
    """Move random blocks by one choice, keeping the moves that come nearer, until near enough or out of luck."""
    distance = table.ratio(sub_network) - ratio
    for _ in range(MOVES_A_BLOCK * len(table.blocks)):
        if abs(distance) <= tolerance:
            break
        block = int(torch.randint(len(table.blocks), (), generator=generator))
        choice = sub_network.choices[block] + (-1 if distance > 0 else 1)
        if 0 <= choice < len(table.blocks[block]):
            moved = sub_network.replace(block, choice)
            moved_distance = table.ratio(moved) - ratio
            if abs(moved_distance) < abs(distance):
                sub_network, distance = moved, moved_distance
    return sub_network
