import json
from dataclasses import replace

import pytest
import torch

from flextron_lit.costs.table import CostTable, weighted_sum
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.space import SpaceConfig
from tests.conftest import make_llama

TABLE = CostTable("latency", "ms", 1.0, ((0.0, 2.0), (1.0, 3.0, 4.0)))


def test_cost_by_hand(backbone):
    space = ElasticBackbone(make_llama(num_hidden_layers=1), SpaceConfig(mlp=[16, 32, 64], attention=[2, 4])).space
    TABLE.check(space)
    assert TABLE.full == 7
    assert TABLE.cost(space.smallest()) == 2
    assert TABLE.ratio(space.full().replace(1, 1)) == 6 / 7
    with pytest.raises(ValueError, match="'latency' has 2 blocks, the model 6"):
        TABLE.check(backbone.space)
    other = ElasticBackbone(make_llama(num_hidden_layers=1), SpaceConfig(mlp=[16, 64], attention=[2, 4])).space
    with pytest.raises(ValueError, match=r"3 choices for layers.0.mlp, the model 2"):
        TABLE.check(other)


def test_expected_cost_by_hand():
    probabilities = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.25, 0.75]], requires_grad=True)
    cost = TABLE.expected(probabilities)
    assert cost.item() == 1 + 1 + 0.75 + 3
    cost.backward()
    assert probabilities.grad.tolist() == [[0, 2, 0], [1, 3, 4]]
    assert TABLE.expected(probabilities.expand(7, 2, 3)).shape == (7,)


def test_a_weighted_sum_is_one_table():
    other = CostTable("other", "ms", 10.0, ((1.0, 1.0), (0.0, 0.0, 2.0)))
    assert weighted_sum("both", [(1, TABLE), (3, other)]) == CostTable(
        "both", "ms", 31.0, ((3.0, 5.0), (1.0, 3.0, 10.0))
    )
    with pytest.raises(AssertionError, match="units differ"):
        weighted_sum("both", [(1, TABLE), (1, CostTable("n", "bytes", 0.0, TABLE.blocks))])


def test_ratios_are_of_the_reference_where_there_is_one():
    space = ElasticBackbone(make_llama(num_hidden_layers=1), SpaceConfig(mlp=[16, 32, 64], attention=[2, 4])).space
    routed = replace(TABLE, reference=5.0)
    assert routed.full == 5
    assert routed.cost(space.full()) == TABLE.full == 7
    assert routed.ratio(space.full()) == 7 / 5
    assert routed.smallest_ratio == 2 / 5
    assert routed.smallest == TABLE.smallest
    assert replace(TABLE, reference=0.0).full == 0


def test_a_table_without_a_reference_has_the_json_and_digest_that_it_always_had():
    assert set(TABLE.to_json()) == {"name", "unit", "fixed", "blocks"}
    assert TABLE.sha256 == "6a2a23f6c77f80e60eb74d85ffa9b9601bbeffd4dc64fa2a7c957606213d9893"
    assert CostTable.from_json(TABLE.to_json()) == TABLE
    routed = replace(TABLE, reference=TABLE.full)
    assert CostTable.from_json(json.loads(json.dumps(routed.to_json()))) == routed != TABLE
    assert routed.sha256 != TABLE.sha256


def test_a_weighted_sum_carries_the_reference():
    routed = replace(TABLE, reference=5.0)
    assert weighted_sum("both", [(1, routed), (3, routed)]).reference == 20
    assert weighted_sum("both", [(2, routed), (1, TABLE)]).full == 2 * 5 + 7
    assert weighted_sum("both", [(2, TABLE)]).reference is None


@pytest.mark.parametrize(
    ("name", "value"), [("fixed", -100.0), ("fixed", float("nan")), ("reference", 0.0), ("name", "../outside")]
)
def test_a_table_that_no_cost_can_be_of_is_refused(name, value):
    assert CostTable.from_json(TABLE.to_json()) == TABLE
    with pytest.raises(ValueError, match=r"full network's|is no name of a cost"):
        CostTable.from_json(TABLE.to_json() | {name: value})
