import itertools

import pytest
import torch

from flextron_lit.costs import CostTable, parameter_table
from flextron_lit.costs.budget import Limit, meets, parse_budget
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.routers.search import best_random, best_uniform, evolution, fit
from flextron_lit.space import Block, ElasticSpace, SpaceConfig, SubNetwork
from tests import options
from tests.conftest import make_llama


def random_space(generator):
    """A few layers with one to four widths a block."""
    layers = int(torch.randint(1, 5, (), generator=generator))
    blocks = []
    for layer, kind in itertools.product(range(layers), ("attention", "mlp")):
        count = int(torch.randint(1, 5, (), generator=generator))
        widths = (torch.randperm(8, generator=generator)[:count] + 1).sort().values.tolist()
        blocks.append(Block(layer, kind, (*[w for w in widths if w < 9], 9)))
    return ElasticSpace(tuple(blocks))


def random_table(space, generator, name="cost"):
    """Costs that need not rise with the width, as measured ones."""
    rows = tuple(tuple(torch.rand(len(b.widths), generator=generator).tolist()) for b in space.blocks)
    return CostTable(name, "ms", torch.rand((), generator=generator).item(), rows)


def loss_of(space, generator):
    """A loss to minimise: every block has a value of its own for every choice."""
    values = [torch.rand(len(b.widths), generator=generator).sort(descending=True).values for b in space.blocks]
    return lambda s: sum(row[choice].item() for row, choice in zip(values, s.choices, strict=True))


SEARCHES = {
    "uniform": lambda space, limits, score, generator: best_uniform(space, limits, score),
    "random": lambda space, limits, score, generator: best_random(space, limits, score, count=10, generator=generator),
    "evolution": lambda space, limits, score, generator: evolution(
        space, limits, score, count=30, generator=generator, population=6
    ),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_no_search_ever_exceeds_a_budget(name, generator):
    answers = [answer(name, generator) for _ in range(120)]
    assert answers.count("feasible") > 20
    refusal = {"uniform": "no sub-network with all layers alike meets the budget; loosen it, or search otherwise"}
    tried = "no sub-network that was tried meets all limits of the budget at once; loosen one"
    assert answers.count(refusal.get(name, tried)) > 0
    assert len(set(answers)) == 2


def answer(name, generator):
    """Search a random space under two random limits: the message of a refusal, or `feasible` after all checks."""
    space = random_space(generator)
    tables = [random_table(space, generator, f"cost{i}") for i in range(2)]
    limits = []
    for table in tables:
        share = torch.rand((), generator=generator).item()
        limits.append(Limit(table, table.smallest + share * abs(table.full - table.smallest), "limit"))
    score = loss_of(space, generator)
    scored = []

    def noted(sub_network):
        scored.append(sub_network)
        return score(sub_network)

    try:
        found = SEARCHES[name](space, limits, noted, generator)
    except ValueError as error:
        return str(error)
    assert meets(found.sub_network, limits)
    assert all(meets(s, limits) for s in scored)
    assert found.score == min(map(score, scored)) == score(found.sub_network)
    assert found.evaluations == len(scored) == len(set(scored))
    space.check(found.sub_network)
    return "feasible"


@pytest.fixture(scope="module")
def deep():
    backbone = ElasticBackbone(make_llama(num_hidden_layers=8), SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]))
    return backbone.space, {"parameters": parameter_table(backbone)}


def test_uniform_tries_only_pairs_that_no_feasible_one_contains(deep):
    space, tables = deep
    scored = []
    limits = parse_budget("parameters<=0.6", tables)
    best_uniform(space, limits, lambda s: scored.append(s) or 0.0)
    feasible = [
        space.uniform(mlp, attention)
        for mlp in (0, 0.25, 0.5, 1)
        for attention in (0.25, 0.5, 1)
        if meets(space.uniform(mlp, attention), limits)
    ]
    assert set(scored) < set(feasible)
    for other in set(feasible) - set(scored):
        assert any(all(a >= b for a, b in zip(s.choices, other.choices, strict=True)) for s in scored)
    assert best_uniform(space, parse_budget("parameters<=1", tables), lambda s: 0.0).sub_network == space.full()


def test_fit_uses_the_budget_up(deep, generator):
    space, tables = deep
    limits = parse_budget("parameters<=0.6", tables)
    for start in (space.full(), space.smallest(), space.random(generator)):
        fitted = fit(space, start, limits, generator)
        assert meets(fitted, limits)
        for index, block in enumerate(space.blocks):
            if fitted.choices[index] + 1 < len(block.widths):
                assert not meets(fitted.replace(index, fitted.choices[index] + 1), limits)
    assert fit(space, space.full(), parse_budget("parameters<=1", tables), generator) == space.full()


def test_evolution_beats_random_and_uniform_on_a_loss_with_structure(generator):
    layers = 24
    backbone = ElasticBackbone(
        make_llama(num_hidden_layers=layers), SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4])
    )
    space = backbone.space
    limits = parse_budget("parameters<=0.6", {"parameters": parameter_table(backbone)})
    # half of the layers are all that matters, and nearly all of them fit: the best is near -60, chance stays far off,
    # and networks that are alike in all layers spend half of the budget in vain
    order = torch.randperm(layers, generator=torch.Generator().manual_seed(options.seed(0))).tolist()
    wanted = set(order[: layers // 2])

    def score(sub_network: SubNetwork) -> float:
        choices = zip(space.blocks, sub_network.choices, strict=True)
        return -float(sum(choice for block, choice in choices if block.layer in wanted))

    uniform = best_uniform(space, limits, score)
    # all uniform ones are among those that it starts from, and are only widened
    first = evolution(space, limits, score, count=24, generator=generator, population=24)
    assert first.score <= uniform.score == -(layers // 2) * 3
    evolved = evolution(space, limits, score, count=600, generator=generator, population=24)
    drawn = best_random(space, limits, score, count=600, generator=generator)
    assert score(space.full()) == -60 <= evolved.score < drawn.score < uniform.score
    assert evolved.evaluations <= 600


def test_the_same_seed_finds_the_same(deep):
    space, tables = deep
    limits = parse_budget("parameters<=0.7", tables)
    found, tried = [], []
    for seed in (1, 1, 2):
        scored = []
        generator = torch.Generator().manual_seed(options.seed(seed))
        found.append(
            evolution(space, limits, lambda s, own=scored: own.append(s) or hash(s) % 97, count=40, generator=generator)
        )
        tried.append(scored)
    assert found[0] == found[1]
    # another seed tries others, though it may find the same
    assert tried[0] == tried[1] != tried[2]
