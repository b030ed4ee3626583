"""How sub-networks are drawn: small callables, each with its source."""

import math
from collections.abc import Callable, Mapping

import torch

from flextron_lit.costs import CostTable
from flextron_lit.space import ElasticSpace, SubNetwork

TRIES = 20
MOVES_A_BLOCK = 20


Strategy = Callable[[ElasticSpace, CostTable, int, torch.Generator], list[SubNetwork]]
"""(space, cost table, k, generator) to the k sub-networks of a step."""


def independent(space: ElasticSpace, table: CostTable, k: int, generator: torch.Generator) -> list[SubNetwork]:
    """Every block draws for itself (paper, elastic continued training); such draws cluster at middling costs."""
    return [space.random(generator) for _ in range(k)]


def uniform(space: ElasticSpace, table: CostTable, k: int, generator: torch.Generator) -> list[SubNetwork]:
    """All layers alike, one draw for the MLPs and one for attention (MatFormer): the corners of the space."""
    return [space.random_uniform(generator) for _ in range(k)]


def stratified(space: ElasticSpace, table: CostTable, k: int, generator: torch.Generator) -> list[SubNetwork]:
    """One sub-network from each of k equal ranges of cost between the smallest and the full network (ours)."""
    ratios = budgets(table.ratio(space.smallest()), k, generator)
    return [nearest_to_cost(space, table, ratio, generator, tries=1) for ratio in ratios]


def sandwich(space: ElasticSpace, table: CostTable, k: int, generator: torch.Generator) -> list[SubNetwork]:
    """The smallest sub-network, the others independent (Yu and Huang 2019; the full one is the bread on top)."""
    return [space.smallest(), *independent(space, table, k - 1, generator)]


STRATEGIES: dict[str, Strategy] = {
    "independent": independent,
    "uniform": uniform,
    "stratified": stratified,
    "sandwich": sandwich,
}


def draw(
    shares: Mapping[str, float],
    space: ElasticSpace,
    table: CostTable,
    k: int,
    generator: torch.Generator,
    strategies: Mapping[str, Strategy] = STRATEGIES,
) -> list[SubNetwork]:
    """The sub-networks of one step, by a strategy drawn by its share.

    Args:
        shares: strategies by name, with the share of the steps that use them; they need not add up to 1.
        space: the choices.
        table: the cost that strata are ranges of.
        k: number of sub-networks.
        generator: source of all draws.
        strategies: what the names mean.
    """
    names = list(shares)
    weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
    chosen = names[int(torch.multinomial(weights, 1, generator=generator))]
    return strategies[chosen](space, table, k, generator)


def budgets(smallest: float, k: int, generator: torch.Generator) -> list[float]:
    """One cost ratio from each of k equal ranges between the smallest one and 1 (ours)."""
    draws = torch.rand(k, generator=generator, dtype=torch.float64).tolist()
    return [smallest + (1 - smallest) * (stratum + draw) / k for stratum, draw in enumerate(draws)]


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
    found = nearest_to_cost(space, table, ratio, generator, tolerance)
    if abs(table.ratio(found) - ratio) > tolerance:
        raise ValueError(
            f"no sub-network within {tolerance:g} of {ratio:g} of the full {table.name}; "
            f"the nearest found costs {table.ratio(found):.3f}: allow a larger tolerance"
        )
    return found


def nearest_to_cost(
    space: ElasticSpace,
    table: CostTable,
    ratio: float,
    generator: torch.Generator,
    tolerance: float = 0.01,
    tries: int = TRIES,
) -> SubNetwork:
    """As `at_cost`, but the nearest found in so many tries where none is within the tolerance."""
    beta = _solve_beta(table, ratio * table.full)
    nearest = space.full()
    for _ in range(tries):
        found = _move_closer(_draw(table, beta, generator), table, ratio, generator, tolerance)
        nearest = min(found, nearest, key=lambda candidate: abs(table.ratio(candidate) - ratio))
        if abs(table.ratio(nearest) - ratio) <= tolerance:
            break
    return nearest


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
        row = table.blocks[block]
        if 0 <= choice < len(row):
            moved = distance + (row[choice] - row[sub_network.choices[block]]) / table.full
            if abs(moved) < abs(distance):
                sub_network, distance = sub_network.replace(block, choice), moved
    return sub_network
