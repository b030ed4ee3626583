import pytest
import torch

from flextron_lit.costs import parameter_table
from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.space import SpaceConfig
from tests.conftest import make_llama
from tests.options import seed


@pytest.fixture(scope="module")
def deep():
    backbone = ElasticBackbone(make_llama(num_hidden_layers=12), SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]))
    return backbone.space, parameter_table(backbone)


def is_uniform(sub_network):
    return sub_network.choices == sub_network.choices[:2] * (len(sub_network.choices) // 2)


def test_independent_and_uniform_are_what_they_say(deep, generator):
    space, table = deep
    assert not any(is_uniform(s) for s in sampling.independent(space, table, 300, generator))
    drawn = sampling.uniform(space, table, 300, generator)
    assert all(is_uniform(s) for s in drawn)
    assert len(set(drawn)) == 12


def test_sandwich_always_holds_the_smallest(deep, generator):
    space, table = deep
    smallest, *others = sampling.sandwich(space, table, 4, generator)
    assert smallest == space.smallest()
    assert len(set(others) - {smallest}) == 3
    assert sampling.sandwich(space, table, 1, generator) == [smallest]


@pytest.mark.parametrize("k", [1, 4])
def test_stratified_draws_one_from_each_range_of_cost(deep, k, generator):
    space, table = deep
    low = table.ratio(space.smallest())
    edges = [low + (1 - low) * i / k for i in range(k + 1)]
    ratios = [[table.ratio(s) for s in sampling.stratified(space, table, k, generator)] for _ in range(80)]
    for row in ratios:
        assert all(edges[i] - 0.02 <= ratio <= edges[i + 1] + 0.02 for i, ratio in enumerate(row))
    first = [row[0] for row in ratios]
    assert max(first) - min(first) > 0.5 * (edges[1] - edges[0])
    independent = [table.ratio(s) for s in sampling.independent(space, table, 40, generator)]
    assert min(independent) > min(first) + 0.02


def test_stratified_works_where_few_costs_exist(generator):
    backbone = ElasticBackbone(make_llama(num_hidden_layers=1), SpaceConfig(mlp=[16, 64], attention=[4]))
    drawn = sampling.stratified(backbone.space, parameter_table(backbone), 40, generator)
    assert set(drawn) == {backbone.space.full(), backbone.space.smallest()}


def test_a_mix_uses_each_strategy_in_its_share(deep, generator):
    space, table = deep
    shares = {"independent": 3.0, "uniform": 1.0, "sandwich": 1.0}
    steps = [sampling.draw(shares, space, table, 2, generator) for _ in range(1000)]
    smallest = space.smallest()
    sandwiches = sum(plan[0] == smallest and not is_uniform(plan[1]) for plan in steps)
    alike = sum(all(map(is_uniform, plan)) for plan in steps)
    assert all(len(plan) == 2 for plan in steps)
    # 200 of 1000 each, with a standard deviation of 12.6: five of them are left about once in two million seeds
    assert 137 < sandwiches < 263
    assert 137 < alike < 263
    assert not any(
        all(map(is_uniform, sampling.draw({"independent": 1}, space, table, 2, generator))) for _ in range(50)
    )


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
def test_at_cost_reaches_every_cost(deep, ratio, generator):
    space, table = deep
    drawn = [sampling.at_cost(space, table, ratio, generator) for _ in range(20)]
    assert all(abs(table.ratio(d) - ratio) <= 0.01 for d in drawn)
    if ratio < 0.95:
        assert len(set(drawn)) > 15
        assert not all(is_uniform(d) for d in drawn)
    again = torch.Generator().manual_seed(seed(3))
    assert [sampling.at_cost(space, table, ratio, again) for _ in range(20)] == drawn


def test_plain_draws_would_not_reach_it(deep, generator):
    space, table = deep
    ratios = [table.ratio(space.random(generator)) for _ in range(200)]
    assert min(ratios) > 0.25
    assert max(ratios) < 0.75


def test_a_cost_below_the_smallest_is_refused(deep, generator):
    space, table = deep
    with pytest.raises(
        ValueError, match=r"no sub-network costs 0.01 of the full parameters: the smallest costs 0\.\d+"
    ):
        sampling.at_cost(space, table, 0.01, generator)
    with pytest.raises(ValueError, match="costs 1.2 of the full"):
        sampling.at_cost(space, table, 1.2, generator)


def test_a_tolerance_that_no_sub_network_meets_is_refused(generator):
    backbone = ElasticBackbone(make_llama(), SpaceConfig(mlp=[16, 64], attention=[4]))
    with pytest.raises(ValueError, match="no sub-network within 1e-06 of 0.77 .* allow a larger tolerance"):
        sampling.at_cost(backbone.space, parameter_table(backbone), 0.77, generator, tolerance=1e-6)
