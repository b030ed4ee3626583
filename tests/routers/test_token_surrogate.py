import pytest
import torch

from flextron_lit.routers.surrogate import TokenSurrogate
from flextron_lit.space import SpaceConfig, resolve
from tests import options

SPACE = resolve(SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]), num_layers=2, neurons=64, kv_groups=4)
D = 6


def surrogate(seed=0):
    return TokenSurrogate(SPACE, D, rank=2, hidden=16, generator=torch.Generator().manual_seed(options.seed(seed)))


def drawn(count, seed):
    """Random choices, hidden states of two kinds, and losses: one MLP's width matters for one of the kinds alone."""
    generator = torch.Generator().manual_seed(options.seed(seed))
    widths = torch.stack([torch.randint(len(block.widths), (count,), generator=generator) for block in SPACE.blocks], 1)
    kinds = torch.randint(2, (count,), generator=generator)
    states = 0.1 * torch.randn(count, D, generator=generator) + 2 * torch.eye(D)[1 - kinds]
    hard = states[:, 0] > states[:, 1]
    assert torch.equal(hard, kinds == 1)
    losses = 0.3 * (3 - widths[:, 3]) + 1.5 * hard * (3 - widths[:, 1])
    return torch.nn.functional.one_hot(widths, SPACE.num_choices).float(), states, losses


def fit(network, choices, states, losses, steps=300):
    network.scale.copy_(losses.std())
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        ((network(choices, states) - losses) / network.scale).square().mean().backward()
        optimizer.step()
    return network


def unexplained(network, choices, states, losses):
    with torch.no_grad():
        return ((network(choices, states) - losses).square().mean() / losses.var()).item()


def test_it_knows_nothing_at_first_and_has_gradients_everywhere():
    network = surrogate()
    choices, states, losses = drawn(64, 1)
    assert not network(choices, states).any()
    (network(choices, states) - losses).square().mean().backward()
    # what starts at zero moves first, and opens the way for the rest
    assert all(layer.weight.grad.abs().sum() > 0 for layer in (network.main, network.effects, network.residual))
    fit(network, choices, states, losses, steps=2)
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_it_learns_which_tokens_a_width_matters_for_and_without_their_states_does_not():
    network = fit(surrogate(), *drawn(2000, 1))
    choices, states, losses = drawn(500, 2)
    assert unexplained(network, choices, states, losses) < 0.1
    blind = fit(surrogate(), drawn(2000, 1)[0], torch.zeros(2000, D), drawn(2000, 1)[2])
    assert unexplained(blind, choices, torch.zeros(500, D), losses) > 0.2


def test_each_token_has_a_gradient_of_its_own():
    network = fit(surrogate(), *drawn(2000, 1))
    choices, states, _ = drawn(200, 2)
    choices = choices.requires_grad_()
    (gradient,) = torch.autograd.grad(network(choices, states).sum(), choices)
    # what the widest choice of the MLP is worth against skipping it
    worth = gradient[:, 1, 0] - gradient[:, 1, 3]
    hard = states[:, 0] > states[:, 1]
    assert worth[hard].mean() > worth[~hard].mean() + 2


def test_answers_scale_with_the_targets():
    network = fit(surrogate(), *drawn(200, 1), steps=5)
    choices, states, _ = drawn(10, 2)
    once = network(choices, states)
    network.scale.mul_(2)
    torch.testing.assert_close(network(choices, states), 2 * once)


def test_any_leading_shape_is_taken():
    network = fit(surrogate(), *drawn(200, 1), steps=5)
    choices, states, _ = drawn(12, 2)
    flat = network(choices, states)
    folded = network(choices.unflatten(0, (3, 4)), states.unflatten(0, (3, 4)))
    torch.testing.assert_close(folded, flat.view(3, 4))
    assert flat.std() > 0


def test_the_seed_decides_the_first_weights_and_the_global_one_does_not():
    before = torch.get_rng_state()
    one, same, other = surrogate(0), surrogate(0), surrogate(1)
    assert torch.equal(one.directions.weight, same.directions.weight)
    assert torch.equal(one.of_state.weight, same.of_state.weight)
    assert not torch.equal(one.directions.weight, other.directions.weight)
    assert before.shape == torch.get_rng_state().shape


def test_autocast_does_not_round_its_answers():
    network = fit(surrogate(), *drawn(200, 1), steps=5)
    choices, states, _ = drawn(10, 2)
    exact = network(choices, states)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(choices, states), exact)
        # what it would be otherwise
        assert network.directions(states).dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [1.0, 50.0])
def test_hidden_states_count_by_their_direction(scale):
    network = fit(surrogate(), *drawn(200, 1), steps=5)
    choices, states, _ = drawn(10, 2)
    torch.testing.assert_close(network(choices, scale * states), network(choices, states), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(network(choices, -states), network(choices, states), atol=1e-2)
