"""Sub-networks for a budget by search: the baseline of routers, and the check on them (ours).

Every search works on one interface: limits that no answer exceeds, and a score (a loss, lower is better) to minimise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch

from flextron_lit.costs.budget import Limits, meets
from flextron_lit.space import KINDS, ElasticSpace, SubNetwork

Score = Callable[[SubNetwork], float]
Search = Literal["uniform", "random", "evolution"]
SEARCHES: tuple[Search, ...] = get_args(Search)
TOURNAMENT = 3
MUTATION = 0.1
"""Chance of each block to draw a new choice."""


@dataclass(frozen=True)
class Found:
    """What a search answers."""

    sub_network: SubNetwork
    score: float
    evaluations: int
    """How many sub-networks were scored."""


def best_by(
    search: Search, space: ElasticSpace, limits: Limits, score: Score, *, count: int, generator: torch.Generator
) -> Found:
    """What a search by its name finds; `count` and `generator` are of `random` and `evolution` alone.

    Raises:
        ValueError: if no feasible sub-network was found.
    """
    if search == "uniform":
        return best_uniform(space, limits, score)
    if search == "random":
        return best_random(space, limits, score, count=count, generator=generator)
    return evolution(space, limits, score, count=count, generator=generator)


def best_uniform(space: ElasticSpace, limits: Limits, score: Score) -> Found:
    """The best of the sub-networks that are alike in all layers: all pairs of an MLP and an attention width.

    Pairs that another feasible one contains are left out: they are smaller in both, and so no better.

    Raises:
        ValueError: if none is feasible.
    """
    pairs = [pair for pair in uniform_pairs(space) if meets(pair[1], limits)]
    if not pairs:
        raise ValueError("no sub-network with all layers alike meets the budget; loosen it, or search otherwise")

    def contained(ratios: tuple[float, float]) -> bool:
        return any(o != ratios and o[0] >= ratios[0] and o[1] >= ratios[1] for o, _ in pairs)

    return _best(_scored((each for ratios, each in pairs if not contained(ratios)), score))


def uniform_pairs(space: ElasticSpace) -> Iterator[tuple[tuple[float, float], SubNetwork]]:
    """Sub-networks that are alike in all layers, each with its MLP and its attention ratio."""
    ratios = {
        kind: sorted({width / b.full for b in space.blocks if b.kind == kind for width in b.widths}) for kind in KINDS
    }
    lowest = {kind: max(b.widths[0] / b.full for b in space.blocks if b.kind == kind) for kind in KINDS}
    for mlp, attention in product(ratios["mlp"], ratios["attention"]):
        if mlp >= lowest["mlp"] and attention >= lowest["attention"]:
            yield (mlp, attention), space.uniform(mlp, attention)


def best_random(space: ElasticSpace, limits: Limits, score: Score, *, count: int, generator: torch.Generator) -> Found:
    """The best of `count` random sub-networks that use the budget up.

    Raises:
        ValueError: if no feasible one was found.
    """
    drawn = (fit(space, space.random(generator), limits, generator) for _ in range(count))
    return _best(_scored(drawn, score))


def evolution(
    space: ElasticSpace, limits: Limits, score: Score, *, count: int, generator: torch.Generator, population: int = 12
) -> Found:
    """Evolution as Once-for-All searches: winners of tournaments breed, the worst leaves.

    Starts from the feasible uniform sub-networks and random ones; a child crosses two parents block by block, mutates,
    and is fitted to the budget, so that no sub-network over it is ever scored.

    Args:
        space: the choices.
        limits: what no answer exceeds.
        score: to minimise.
        count: sub-networks to score.
        generator: source of all draws.
        population: how many live at once.

    Raises:
        ValueError: if no feasible sub-network was found.
    """
    uniform = [each for _, each in uniform_pairs(space) if meets(each, limits)]
    starts = [fit(space, each, limits, generator) for each in uniform[-population // 2 :]]
    starts += [fit(space, space.random(generator), limits, generator) for _ in range(population - len(starts))]
    alive = [start for start in starts if start is not None][: max(1, count)]
    scores = _scored(alive, score)
    stale = 0
    while alive and len(scores) < count and stale < 10 * population:
        mother, father = (_winner(alive, scores, generator) for _ in range(2))
        child = fit(space, _child(space, mother, father, generator), limits, generator)
        stale = stale + 1 if child is None or child in scores else 0
        if child is not None and not stale:
            scores[child] = score(child)
            alive = sorted([*alive, child], key=scores.__getitem__)[:population]
    return _best(scores)


def _scored(candidates: Iterable[SubNetwork | None], score: Score) -> dict[SubNetwork, float]:
    """Scores, each worked out once; None is a draw that could not be fitted."""
    return {each: score(each) for each in dict.fromkeys(candidates) if each is not None}


def _best(scores: Mapping[SubNetwork, float]) -> Found:
    if not scores:
        raise ValueError("no sub-network that was tried meets all limits of the budget at once; loosen one")
    best = min(scores, key=scores.__getitem__)
    return Found(best, scores[best], len(scores))


def _winner(alive: list[SubNetwork], scores: Mapping[SubNetwork, float], generator: torch.Generator) -> SubNetwork:
    drawn = torch.randint(len(alive), (TOURNAMENT,), generator=generator).tolist()
    return min((alive[i] for i in drawn), key=scores.__getitem__)


def _child(space: ElasticSpace, mother: SubNetwork, father: SubNetwork, generator: torch.Generator) -> SubNetwork:
    from_mother, mutated = torch.rand(2, len(space), generator=generator).tolist()
    fresh = space.random(generator).choices
    genes = zip(mother.choices, father.choices, fresh, from_mother, mutated, strict=True)
    return SubNetwork(tuple(new if m < MUTATION else a if f < 0.5 else b for a, b, new, f, m in genes))


def fit(space: ElasticSpace, sub_network: SubNetwork, limits: Limits, generator: torch.Generator) -> SubNetwork | None:
    """A sub-network near another that meets a budget and leaves no block that could still grow.

    Narrows random blocks until every limit holds, then widens random blocks while they do. Feasible whatever the cost
    tables are like; None if even the narrowest does not meet all limits at once.
    """
    while not meets(sub_network, limits):
        wide = [block for block, choice in enumerate(sub_network.choices) if choice]
        if not wide:
            return None
        block = wide[int(torch.randint(len(wide), (), generator=generator))]
        sub_network = sub_network.replace(block, sub_network.choices[block] - 1)
    grown = True
    while grown:
        grown = False
        for block in torch.randperm(len(space), generator=generator).tolist():
            choice = sub_network.choices[block] + 1
            if choice < len(space.blocks[block].widths) and meets(wider := sub_network.replace(block, choice), limits):
                sub_network, grown = wider, True
    return sub_network
