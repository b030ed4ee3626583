"""Excess losses of whole layers: both blocks of a layer go at once, and layers in the order that was measured."""

from collections import Counter
from itertools import pairwise, product
from math import ceil

import pytest
import torch
from torch.nn.functional import one_hot

from flextron_lit.costs import CostTable
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.routers.feasible_decoding import Additive, Bound, decode
from flextron_lit.routers.from_budget import Routing
from flextron_lit.space import Block, ElasticSpace, SubNetwork

ORDER = {3: 0.02, 1: 0.05, 4: 0.04, 2: 0.3}
"""The third, measured, lost less than the one before it: it goes after it all the same."""


def space():
    blocks = [
        Block(layer, kind, (0, full) if layer in ORDER else (full,))
        for layer in range(6)
        for kind, full in (("attention", 2), ("mlp", 8))
    ]
    return ElasticSpace(tuple(blocks))


def table(attention=3.0, mlp=5.0):
    costs = [
        [own * (width > 0) for width in block.widths]
        for block in space().blocks
        for own in [attention if block.kind == "attention" else mlp]
    ]
    return CostTable("latency", "ms", 4.0, tuple(map(tuple, costs)))


def excess(layers=ORDER):
    return ExcessTable(tuple((0.1, 0.0) if len(block.widths) > 1 else (0.0,) for block in space().blocks), 8, layers)


def skipped(sub_network):
    widths = space().widths(sub_network)
    return [layer for layer in range(6) if widths[2 * layer : 2 * layer + 2] == (0, 0)], widths.count(0)


@pytest.mark.parametrize("costs", [(3.0, 5.0), (5.0, 3.0), (2.0, 20.0)])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_draws_skip_whole_layers(costs, spread):
    drawn = excess().draw(space(), table(*costs), 64, torch.Generator().manual_seed(0), spread)
    found = [skipped(each) for each in drawn]
    assert all(count == 2 * len(layers) for layers, count in found)
    assert {len(layers) for layers, _ in found} == {1, 2, 3, 4}
    in_order = all(set(layers) == set([*ORDER][: len(layers)]) for layers, _ in found)
    assert in_order == (spread == 0)


def test_draws_are_of_the_budgets_that_are_given():
    drawn = excess().draw(space(), table(), 400, torch.Generator().manual_seed(0), 0.0, among=[0.9, 0.5, 0.5])
    counts = Counter(len(skipped(each)[0]) for each in drawn)
    # of 52: a layer less takes 44, three less 28, four less 20
    assert set(counts) == {1, 4}
    assert 1.5 < counts[4] / counts[1] < 2.7
    too_small = excess().draw(space(), table(), 8, torch.Generator().manual_seed(0), 0.0, among=[0.1])
    assert {len(skipped(each)[0]) for each in too_small} == {4}


@pytest.mark.parametrize("costs", [(3.0, 5.0), (5.0, 3.0)])
def test_every_budget_is_answered_with_whole_layers_in_their_order(costs):
    prices = table(*costs)
    routing = Routing(space(), {"latency": prices}, {}, None, excess())
    found = {}
    for percent in range(39, 100):
        answer = routing.answer(routing.parse(f"latency={percent / 100}")).sub_network
        layers, skips = skipped(answer)
        assert skips == 2 * len(layers)
        assert set(layers) == set([*ORDER][: len(layers)])
        assert prices.ratio(answer) <= percent / 100
        found[percent] = len(layers)
    # as many as have to, and no more: a layer takes 8 of 52
    assert found == {percent: ceil((52 - 0.52 * percent) / 8) for percent in found}


def test_a_search_alone_leaves_a_part_of_a_layer():
    bound, objective = Bound(table(), torch.tensor([0.95 * 52]).double()), excess().objective(table())
    choices, _ = decode(space(), torch.tensor([space().full().choices]), [bound], objective)
    answers = [SubNetwork(tuple(rows[0].tolist())) for rows in (choices, objective.whole(choices))]
    assert list(map(skipped, answers)) == [([], 1), ([3], 2)]


def test_changes_of_single_blocks_are_predicted_as_each_by_itself():
    objective, generator = excess().objective(table()), torch.Generator().manual_seed(0)
    choices = torch.tensor([space().random(generator).choices for _ in range(5)])
    found = objective.after_changes(choices)
    for block, choice in product(range(12), range(2)):
        changed = choices.clone()
        changed[:, block] = choice
        assert torch.equal(found[:, block, choice], objective(one_hot(changed, 2)))
    # the control: blocks do count together
    summed = Additive(objective.effects).after_changes(choices)
    assert not torch.allclose(found, summed)


def test_without_them_blocks_go_by_themselves():
    drawn = excess({}).draw(space(), table(), 64, torch.Generator().manual_seed(0), 0.0)
    assert any(count != 2 * len(layers) for layers, count in map(skipped, drawn))


def test_a_block_that_saves_nothing_is_not_skipped_alone():
    effects = excess().objective(table(mlp=0.0)).effects
    assert (effects[[2, 3, 4, 5], 0] > 0).all()


def test_what_layers_lose_rises_in_their_order():
    effects = excess().objective(table()).effects
    lost = [float(effects[2 * layer : 2 * layer + 2, 0].sum()) for layer in ORDER]
    assert all(low < high for low, high in pairwise(lost))


def test_a_file_holds_them_in_their_order(tmp_path):
    path = tmp_path / "elastic"
    path.mkdir()
    (path / "excess_losses.json").write_bytes(excess().to_bytes(space()))
    read = ExcessTable.read(tmp_path, space())
    assert list(read.layers.items()) == list(ORDER.items())
    assert read == excess()
