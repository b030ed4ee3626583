import pytest
import torch

from flextron_lit.costs import CostTable
from flextron_lit.costs.sub_network_sampling import stratified
from flextron_lit.routers.pairs import Pairs, draw
from flextron_lit.routers.surrogate import OFFSET, Surrogate, cautious, decode, encode, ridge
from flextron_lit.space import SpaceConfig, SubNetwork, resolve
from tests import options

SPACE = resolve(SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]), num_layers=4, neurons=64, kv_groups=4)
TABLE = CostTable("units", "units", 20.0, tuple(tuple(float(w) for w in block.widths) for block in SPACE.blocks))


# the wider the better, in every block by another amount: what blocks do together is no matter of chance
EFFECTS = torch.linspace(1, 0, SPACE.num_choices) * torch.linspace(0.6, 1, len(SPACE))[:, None]


def measured(count, seed, *, coupled):
    """Pairs with losses that are additive in the blocks, plus a product of three blocks where `coupled`."""
    generator = torch.Generator().manual_seed(options.seed(seed))
    (sub_networks,) = draw(SPACE, TABLE, (count,), generator)
    one_hot = torch.stack([SPACE.one_hot(sub_network) for sub_network in sub_networks])
    each = (one_hot * EFFECTS).sum(-1)
    losses = 3.0 + each.sum(-1) + (4 * each[:, 1] * each[:, 3] * each[:, 5] if coupled else 0)
    return Pairs.of(sub_networks, losses.tolist())


def trained(pairs, steps=600):
    targets = encode("loss", pairs.losses, 3.0)
    network = Surrogate(SPACE, 32, torch.Generator().manual_seed(options.seed(0)))
    network.start(pairs.one_hot(SPACE), targets)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        network.error(pairs.one_hot(SPACE), targets).backward()
        optimizer.step()
    return network


def rms(predicted, pairs):
    return (predicted - pairs.losses).square().mean().sqrt().item()


def test_ridge_recovers_additive_losses_and_not_coupled_ones():
    for coupled in (False, True):
        learned, checked = measured(200, 1, coupled=coupled), measured(50, 2, coupled=coupled)
        weight, bias = ridge(learned.one_hot(SPACE).flatten(1), learned.losses)
        error = rms(checked.one_hot(SPACE).flatten(1) @ weight + bias, checked)
        assert error < 0.01 if not coupled else error > 0.1


def test_the_surrogate_starts_from_ridge_and_learns_what_blocks_do_together():
    learned, checked = measured(300, 1, coupled=True), measured(60, 2, coupled=True)
    started = Surrogate(SPACE, 32, torch.Generator().manual_seed(options.seed(0)))
    started.start(learned.one_hot(SPACE), learned.losses)
    weight, bias = ridge(learned.one_hot(SPACE).flatten(1), learned.losses)
    by_ridge = checked.one_hot(SPACE).flatten(1) @ weight + bias
    assert torch.allclose(started(checked.one_hot(SPACE)), by_ridge, atol=1e-2)
    after = rms(trained(learned)(checked.one_hot(SPACE)), checked)
    assert after < 0.6 * rms(by_ridge, checked)


def test_single_changes_are_predicted_as_one_by_one():
    network = trained(measured(100, 1, coupled=True), steps=50)
    choices = measured(5, 3, coupled=False).choices
    got = network.after_changes(choices)
    for row, sub_network in enumerate(SubNetwork(tuple(c)) for c in choices.tolist()):
        for block in range(len(SPACE)):
            for choice in range(len(SPACE.blocks[block].widths)):
                wanted = network(SPACE.one_hot(sub_network.replace(block, choice)))
                assert torch.allclose(got[row, block, choice], wanted, atol=1e-5)
    # and a change is a change
    assert not torch.allclose(got, network(torch.nn.functional.one_hot(choices, 4).float())[:, None, None], atol=1e-2)


def test_autocast_does_not_round_its_answers():
    network = Surrogate(SPACE, 32, torch.Generator().manual_seed(options.seed(0)))
    one_hot = measured(8, 1, coupled=False).one_hot(SPACE)
    network.start(one_hot, torch.randn(8))
    exact = network(one_hot)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(one_hot), exact)
        # what it would be otherwise
        assert torch.nn.functional.linear(one_hot.flatten(1), network.main.weight).dtype == torch.bfloat16


@pytest.mark.parametrize("target", ["log_excess", "loss"])
def test_decode_undoes_encode(target):
    losses = torch.tensor([3.0, 3.5, 9.0])
    assert torch.allclose(decode(target, encode(target, losses, 3.0), 3.0), losses, atol=1e-6)


def test_no_loss_below_the_full_networks_is_predicted():
    assert encode("log_excess", torch.tensor([2.9]), 3.0).item() == pytest.approx(torch.tensor(OFFSET).log().item())
    assert decode("log_excess", torch.tensor([-5.0]), 3.0).item() == 3.0
    assert decode("loss", torch.tensor([2.9]), 3.0).item() == pytest.approx(2.9)


def test_pairs_are_spread_over_cost_and_not_in_its_order():
    (sub_networks,) = draw(SPACE, TABLE, (40,), torch.Generator().manual_seed(options.seed(0)))
    ratios = [TABLE.ratio(sub_network) for sub_network in sub_networks]
    smallest = TABLE.ratio(SPACE.smallest())
    strata = {int((ratio - smallest) / (1 - smallest) * 8 - 1e-9) for ratio in ratios}
    assert strata == set(range(8))
    assert ratios != sorted(ratios)
    assert [sub_networks] == draw(SPACE, TABLE, (40,), torch.Generator().manual_seed(options.seed(0)))


def test_held_out_pairs_are_never_learned_from():
    small = resolve(SpaceConfig(mlp=[16, 64], attention=[1, 4]), num_layers=3, neurons=64, kv_groups=4)
    table = CostTable("units", "units", 5.0, tuple(tuple(float(w) for w in block.widths) for block in small.blocks))
    learned, checked = draw(small, table, (40, 16), torch.Generator().manual_seed(options.seed(0)))
    assert len(set(learned)) == 40
    assert len(set(checked)) == 16
    assert not set(learned) & set(checked)
    # every one that there is, if as many are asked for
    (everything,) = draw(small, table, (64,), torch.Generator().manual_seed(options.seed(0)))
    assert len(set(everything)) == 64
    # a stratified draw alone repeats itself
    assert len(set(stratified(small, table, 40, torch.Generator().manual_seed(options.seed(0))))) < 40
    with pytest.raises(ValueError, match="the space has 64 sub-networks, too few"):
        draw(small, table, (50, 30), torch.Generator().manual_seed(options.seed(0)))


def test_held_out_pairs_are_kept_apart():
    learned = measured(5, 1, coupled=False)
    (drawn,) = draw(SPACE, TABLE, (3,), torch.Generator())
    checked = Pairs.of(drawn, [1.0, 2.0, 3.0], held_out=True)
    both = Pairs.from_tensors((learned + checked).tensors())
    assert torch.equal(both.select(held_out=False).losses, learned.losses)
    assert torch.equal(both.select(held_out=True).choices, checked.choices)
    assert len(both) == 8


def test_what_is_known_beforehand_stays_unless_the_pairs_say_otherwise():
    generator = torch.Generator().manual_seed(options.seed(7))
    blocks, choices, count = len(SPACE), SPACE.num_choices, 12
    truth = torch.rand(blocks, choices, generator=generator)

    def drawn(count):
        chosen = torch.stack([SPACE.one_hot(SPACE.random(generator)) for _ in range(count)])
        return chosen, (chosen * truth).sum((1, 2))

    (inputs, targets), (fresh, wanted) = drawn(count), drawn(200)
    errors = {}
    for name, prior in (("none", None), ("true", 5 * truth), ("wrong", torch.rand(truth.shape, generator=generator))):
        surrogate = Surrogate(SPACE, 8, torch.Generator().manual_seed(0))
        surrogate.start(inputs, targets, prior)
        errors[name] = float((surrogate(fresh).detach() - wanted).square().mean())
    # but for a factor the prior is all that there is to know
    assert errors["true"] < 1e-8
    assert errors["true"] < min(errors["none"], errors["wrong"])


def test_weights_that_chance_explains_are_left_out():
    generator = torch.Generator().manual_seed(options.seed(8))
    inputs = torch.randn(40, 30, generator=generator)
    noise, signal = torch.randn(40, generator=generator), inputs @ torch.ones(30)
    few = [cautious(inputs[i:], noise[i:])[0].norm() for i in range(3)]
    assert min(few) == 0
    weight, bias = cautious(inputs, signal + 3)
    torch.testing.assert_close(weight, torch.ones(30), rtol=0.05, atol=0.05)
    assert bias == pytest.approx(3, abs=0.2)
