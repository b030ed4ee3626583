"""The table of excess losses as a strategy of drawing: what it draws is near a budget and good by the table."""

from itertools import pairwise

import pytest
import torch

from flextron_lit.costs import parameter_table
from flextron_lit.costs.sub_network_sampling import independent
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.routers.excess import FILE, ExcessTable, _cheapest
from flextron_lit.space import SpaceConfig
from tests.conftest import make_llama
from tests.options import seed


@pytest.fixture(scope="module")
def deep():
    backbone = ElasticBackbone(make_llama(num_hidden_layers=12), SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]))
    generator = torch.Generator().manual_seed(seed(4))
    rows = []
    for block in backbone.space.blocks:
        # what a width loses falls as it grows, by how much differs a hundredfold between blocks
        size = float(torch.rand((), generator=generator)) ** 3
        rows.append(tuple(size * (1 - width / block.full) for width in block.widths))
    return backbone.space, parameter_table(backbone), ExcessTable(tuple(rows), 100)


def test_draws_cost_what_they_shall_and_lose_little_by_the_table(deep, generator):
    space, table, excess = deep
    objective = excess.objective(table)

    def lost(sub_networks):
        return objective(torch.stack([space.one_hot(each) for each in sub_networks]))

    drawn = [sub_network for _ in range(20) for sub_network in excess.draw(space, table, 4, generator)]
    low = table.smallest_ratio
    for index, sub_network in enumerate(drawn):
        edge = low + (1 - low) * (index % 4 + 1) / 4
        assert table.ratio(sub_network) <= edge
    assert len(set(drawn)) > 40
    # the control: drawn block by block, whatever each loses
    others = independent(space, table, 80, generator)
    assert lost(excess.draw(space, table, 40, generator)).mean() < lost(others).mean()
    mixed = excess.drawn_or_stratified(space, table, 7, generator)
    assert len(mixed) == 7


def test_without_spread_the_best_ones_are_drawn_alone(deep, generator):
    space, table, excess = deep
    objective = excess.objective(table)

    def lost(spread):
        drawn = excess.draw(space, table, 40, generator, spread=spread)
        return objective(torch.stack([space.one_hot(each) for each in drawn]))

    # what is best at a price is nested, so the cheaper one is nowhere wider
    path = sorted(excess.draw(space, table, 40, generator, spread=0.0), key=table.cost)
    assert all(
        small <= large for one, other in pairwise(path) for small, large in zip(one.choices, other.choices, strict=True)
    )
    around = sorted(excess.draw(space, table, 40, generator), key=table.cost)
    assert any(
        small > large
        for one, other in pairwise(around)
        for small, large in zip(one.choices, other.choices, strict=True)
    )
    assert lost(0.0).mean() < lost(0.5).mean()


def test_the_price_leaves_no_limit_exceeded_and_little_unused(deep):
    space, table, excess = deep
    effects = excess.objective(table).effects.double()[None]
    for ratio in (0.95, 0.7, 0.5):
        limit = torch.tensor([ratio * table.full - table.fixed], dtype=torch.float64)
        chosen = _cheapest(effects, table.padded, limit, space)
        spent = table.padded.gather(1, chosen.T).sum()
        # at one price one block may go all its way
        largest_step = max(row[-1] - row[0] for row in table.blocks)
        assert limit - largest_step < spent <= limit


def test_a_table_of_another_space_is_refused(deep, tmp_path):
    space, _, excess = deep
    assert ExcessTable.read(tmp_path, space) is None
    (tmp_path / FILE).parent.mkdir()
    (tmp_path / FILE).write_bytes(excess.to_bytes(space))
    assert ExcessTable.read(tmp_path, space) == excess
    other = ElasticBackbone(make_llama(num_hidden_layers=12), SpaceConfig(mlp=[16, 64], attention=[1, 4])).space
    with pytest.raises(ValueError, match="is damaged, or of another space"):
        ExcessTable.read(tmp_path, other)
