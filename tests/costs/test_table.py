import copy

import pytest
import torch

from flextron_lit.costs import CostTable, parameter_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.space import SpaceConfig
from tests.conftest import SPACE, elastic_pair, make_llama

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


def test_expected_cost_is_linear_and_agrees_on_one_hot(backbone, generator):
    table = parameter_table(backbone)
    sub_networks = [backbone.space.random(generator) for _ in range(5)]
    one_hot = torch.stack([backbone.space.one_hot(s) for s in sub_networks]).double()
    costs = torch.tensor([table.cost(s) for s in sub_networks], dtype=torch.float64)
    assert torch.equal(table.expected(one_hot), costs)
    assert table.expected(one_hot.mean(0)).item() == pytest.approx(costs.mean().item())
    soft = one_hot[0].clone().requires_grad_()
    table.expected(soft).backward()
    assert soft.grad[1].tolist() == list(table.blocks[1])


def masked_parameters(model, backbone, sub_network):
    """Reference: count what a stand-alone network of these widths would hold, from the module shapes."""
    total = sum(p.numel() for p in model.parameters())
    for block, width in zip(backbone.space.blocks, backbone.space.widths(sub_network), strict=True):
        layer = model.model.layers[block.layer]
        module = layer.self_attn if block.kind == "attention" else layer.mlp
        rows = 1 if block.kind == "mlp" else model.config.head_dim
        per_group = model.config.num_attention_heads // model.config.num_key_value_heads
        hidden = model.config.hidden_size
        removed = block.full - width
        total -= removed * rows * hidden * (3 if block.kind == "mlp" else 2 * per_group + 2)
        if any("bias" in name for name, _ in module.named_parameters()):
            total -= removed * rows * (2 if block.kind == "mlp" else per_group + 2)
            total -= hidden if width == 0 else 0
    return total


def test_parameters_are_counted(llama, generator):
    dense, backbone = elastic_pair(llama)
    table = parameter_table(backbone)
    assert table.full == sum(p.numel() for p in dense.parameters())
    assert table.fixed > 0
    for _ in range(20):
        sub_network = backbone.space.random(generator)
        assert table.cost(sub_network) == masked_parameters(dense, backbone, sub_network)
    assert table.cost(backbone.space.smallest()) < table.cost(backbone.space.uniform(0.5, 0.5)) < table.full


def test_tied_weights_count_once():
    tied, untied = (parameter_table(ElasticBackbone(make_llama(tie_word_embeddings=t), SPACE)) for t in (True, False))
    assert untied.fixed - tied.fixed == 61 * 32
    assert copy.copy(untied.blocks) == tied.blocks
