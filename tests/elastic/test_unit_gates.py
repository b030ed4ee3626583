import pytest
import torch
from torch.nn import functional as F

from flextron_lit.elastic.unit_gates import for_all_tokens, gated, unit_gates
from flextron_lit.losses.cross_entropy import mean_cross_entropy
from flextron_lit.space import SubNetwork
from tests.conftest import elastic_pair
from tests.options import seed

SUB_NETWORKS = [SubNetwork(c) for c in ((1, 2, 0, 3, 2, 0), (2, 1, 2, 2, 0, 1), (2, 3, 3, 0, 1, 3))]


def test_gates_are_the_probabilities_of_being_wide_enough(backbone):
    mlp = backbone.space.blocks[1]
    gates = unit_gates(torch.tensor([0.1, 0.2, 0.3, 0.4]), mlp)
    assert mlp.widths == (0, 16, 32, 64)
    wanted = torch.cat([torch.full((16,), 0.9), torch.full((16,), 0.7), torch.full((32,), 0.4)])
    assert torch.allclose(gates, wanted)


def test_one_hot_gates_give_what_the_sub_network_gives(model, tokens):
    _, backbone = elastic_pair(model)
    outputs = []
    for sub_network in SUB_NETWORKS:
        with torch.no_grad():
            with backbone.use(sub_network):
                wanted = backbone.model(tokens).logits
            with gated(backbone, for_all_tokens(backbone.space.one_hot(sub_network))):
                got = backbone.model(tokens).logits
        assert torch.allclose(got, wanted, atol=2e-5)
        outputs.append(got)
    # and one sub-network is not another
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


class Drawn:
    """A policy whose choices were made before."""

    def __init__(self, choices):
        self.choices = choices

    def begin(self, real):
        pass

    def choose(self, block, hidden_states):
        return self.choices[block]

    def note(self, block, counts):
        pass


@torch.no_grad()
def test_one_hot_gates_of_every_token_give_what_grouped_execution_gives(model, tokens, generator):
    _, backbone = elastic_pair(model)
    outputs = []
    for _ in range(2):
        choices = [torch.randint(len(b.widths), tokens.shape, generator=generator) for b in backbone.space.blocks]
        with backbone.use(Drawn(choices)):
            wanted = backbone.model(tokens).logits
        # one column more than the first attention has choices
        with gated(backbone, lambda block, _, choices=choices: F.one_hot(choices[block], 4).float()):
            got = backbone.model(tokens).logits
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)
        outputs.append(got)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_gradients_are_those_of_finite_differences(backbone, tokens):
    backbone.model.double()
    probabilities = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed(0))).double()
    probabilities = (probabilities / probabilities.sum(-1, keepdim=True)).requires_grad_()

    def loss(p):
        with gated(backbone, for_all_tokens(p)):
            return mean_cross_entropy(backbone.model(tokens).logits.double(), tokens)

    (gradient,) = torch.autograd.grad(loss(probabilities), probabilities)
    for block, choice in ((0, 1), (1, 0), (2, 3), (3, 2), (5, 1)):
        step = torch.zeros_like(probabilities)
        step[block, choice] = 1e-2
        with torch.no_grad():
            slope = (loss(probabilities + step) - loss(probabilities - step)) / 2e-2
        # a wide step, since the loss itself is computed in float32
        assert gradient[block, choice].item() == pytest.approx(slope.item(), abs=2e-4, rel=1e-2)
    assert gradient.abs().max() > 1e-3
