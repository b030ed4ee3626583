import pytest
import torch

from flextron_lit import sampling
from flextron_lit.costs import parameter_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.space import SpaceConfig
from tests.conftest import make_llama


@pytest.fixture(scope="module")
def deep():
    backbone = ElasticBackbone(make_llama(num_hidden_layers=12), SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]))
    return backbone.space, parameter_table(backbone)


def is_uniform(sub_network):
    return sub_network.choices == sub_network.choices[:2] * (len(sub_network.choices) // 2)


def test_independent_mixes_in_its_share_of_uniform_ones(deep, generator):
    space, _ = deep
    counts = [
        sum(is_uniform(sampling.independent(space, generator, share)) for _ in range(300)) for share in (0, 0.3, 1)
    ]
    assert counts[0] == 0
    assert 60 < counts[1] < 120
    assert counts[2] == 300


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6, 0.8, 0.95, 1.0])
def test_at_cost_reaches_every_cost(deep, ratio, generator):
    space, table = deep
    drawn = [sampling.at_cost(space, table, ratio, generator) for _ in range(20)]
    assert all(abs(table.ratio(d) - ratio) <= 0.01 for d in drawn)
    if ratio < 0.95:
        assert len(set(drawn)) > 15
        assert not all(is_uniform(d) for d in drawn)
    again = torch.Generator().manual_seed(3)
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
