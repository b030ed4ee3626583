import copy

import pytest
import torch

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.importance import falling_order, inverse_order, measure, permute, unit_magnitude
from tests.conftest import SPACE, elastic_pair, make_llama


def test_unit_magnitude_by_hand():
    activations = torch.tensor([[[3.0, 4.0, 0.0, 1.0], [0.0, -2.0, 0.0, 0.0]]])
    assert unit_magnitude(activations, 4, 1).tolist() == [3, 6, 0, 1]
    assert unit_magnitude(activations, 2, 1).tolist() == [5 + 2, 1 + 0]
    assert unit_magnitude(activations, 2, 2).tolist() == [7 + 2, 1 + 0]
    heads = torch.tensor([[3.0, 4.0, 0.0, 1.0, 6.0, 8.0, 0.0, 0.0]])
    assert unit_magnitude(heads, 2, 2).tolist() == [5 + 1, 10 + 0]


def test_importance_is_measured_on_the_full_network_and_leaves_it_as_it_was(tokens):
    backbone = ElasticBackbone(make_llama(), SPACE)
    backbone.model.train()
    whole = measure(backbone, [{"input_ids": tokens}])
    with backbone.use(backbone.space.smallest()):
        assert all(torch.equal(a, b) for a, b in zip(whole, measure(backbone, [{"input_ids": tokens}]), strict=True))
    rows = [measure(backbone, [{"input_ids": row[None]}]) for row in tokens]
    for index, total in enumerate(whole):
        torch.testing.assert_close(total, rows[0][index] + rows[1][index], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(total, rows[0][index])
    assert backbone.model.training
    assert not any(e.output._forward_pre_hooks for e in backbone.blocks)


def test_packed_documents_do_not_see_each_other(tokens):
    backbone = ElasticBackbone(make_llama(), SPACE)
    joined = tokens.flatten()[None]
    positions = torch.arange(tokens.shape[1]).repeat(2)[None]
    packed = measure(backbone, [{"input_ids": joined, "position_ids": positions}])
    separate = measure(backbone, [{"input_ids": tokens}])
    one = measure(backbone, [{"input_ids": joined}])
    torch.testing.assert_close(packed[2], separate[2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(packed[2], one[2])


def test_importance_needs_text():
    with pytest.raises(ValueError, match="at least one calibration batch"):
        measure(ElasticBackbone(make_llama(), SPACE), [])


def test_falling_order_keeps_ties_in_place():
    (order,) = falling_order([torch.tensor([1.0, 3.0, 1.0, 2.0])])
    assert order.tolist() == [1, 3, 0, 2]
    (back,) = inverse_order([order])
    assert order[back].tolist() == [0, 1, 2, 3]


def test_sorting_keeps_the_function_and_can_be_undone_bit_for_bit(llama, tokens):
    dense, backbone = elastic_pair(llama)
    order = falling_order(measure(backbone, [{"input_ids": tokens}]))
    assert any(o.tolist() != sorted(o.tolist()) for o in order)
    permute(backbone, order)
    with torch.no_grad():
        expected = dense(tokens).logits
        torch.testing.assert_close(backbone.model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.equal(
            backbone.model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight
        )
    after = measure(backbone, [{"input_ids": tokens}])
    assert all((scores[:-1] - scores[1:]).min() > -1e-3 for scores in after)
    permute(backbone, inverse_order(order))
    assert all(torch.equal(v, dense.state_dict()[k]) for k, v in backbone.model.state_dict().items())


@pytest.mark.parametrize(
    "forgotten", ["q_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.bias"]
)
def test_a_forgotten_tensor_changes_the_function(forgotten, tokens, monkeypatch):
    dense, backbone = elastic_pair(make_llama(attention_bias=True, mlp_bias=True))
    order = falling_order(measure(backbone, [{"input_ids": tokens}]))
    kept = {n: p.clone() for n, p in backbone.model.named_parameters() if n.endswith(forgotten)}
    permute(backbone, order)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if name in kept:
                parameter.copy_(kept[name])
        assert (backbone.model(tokens).logits - dense(tokens).logits).abs().max() > 1e-2


def test_a_wrong_order_is_refused_and_nothing_changes(backbone):
    before = copy.deepcopy(backbone.model.state_dict())
    orders = [torch.arange(e.block.full) for e in backbone.blocks]
    with pytest.raises(ValueError, match="5 orders for 6 blocks"):
        permute(backbone, orders[:5])
    orders[0] = orders[0].flip(0)
    orders[3] = torch.zeros(64, dtype=torch.long)
    with pytest.raises(ValueError, match="the order of layers.1.mlp is not a permutation of its 64 units"):
        permute(backbone, orders)
    assert all(torch.equal(v, before[k]) for k, v in backbone.model.state_dict().items())
