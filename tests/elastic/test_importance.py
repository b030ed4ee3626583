import copy

import pytest
import torch

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.importance import balanced, falling_order, measure, permute, unit_magnitude
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
    back = order.argsort()
    assert order[back].tolist() == [0, 1, 2, 3]


def test_outgoing_magnitude_is_the_norm_of_what_a_unit_adds(model, tokens):
    _, backbone = elastic_pair(model)
    scores = measure(backbone, [{"input_ids": tokens}], "outgoing")
    plain = measure(backbone, [{"input_ids": tokens}], "magnitude")
    assert not any(torch.allclose(s, p) for s, p in zip(scores, plain, strict=True))
    for elastic, found in zip(backbone.blocks, scores, strict=True):
        read = []
        handle = elastic.output.register_forward_pre_hook(lambda _, inputs, read=read: read.append(inputs[0].detach()))
        backbone.model(tokens)
        handle.remove()
        heads = read[0].flatten(0, 1).unflatten(-1, (elastic.block.full * elastic.heads_per_unit, -1))
        weight = elastic.outgoing.detach().unflatten(0, heads.shape[1:])
        added = torch.einsum("nhr,hrd->nhd", heads, weight).norm(dim=-1).sum(0)
        expected = added.unflatten(0, (elastic.block.full, -1)).sum(-1)
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_balanced_texts_count_the_same():
    quiet, loud = [torch.tensor([1.0, 3.0])], [torch.tensor([300.0, 100.0])]
    assert balanced([quiet, loud])[0].tolist() == [0.5, 0.5]
    assert (quiet[0] + loud[0]).argmax() == 0


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
