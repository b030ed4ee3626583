from itertools import pairwise

import pytest
import torch

from flextron_lit.costs import CostTable
from flextron_lit.routers.dynamic import CONFIDENCE, DynamicPolicy, DynamicRouter, RoutedPass, mean_ratio
from flextron_lit.space import SpaceConfig, SubNetwork, resolve
from tests import options

SPACE = resolve(SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, 1, 2, 4]), num_layers=2, neurons=64, kv_groups=4)
D = 8
BUDGETS = torch.tensor([0.2, 0.5, 0.6, 1.0])
# costs that rise with the width, and a reference that is not the widest network
TABLE = CostTable("units", "units", 9.0, tuple(tuple(float(w) for w in block.widths) for block in SPACE.blocks), 140.0)


def random_router(seed=0):
    """Everything random, the standardisation too: zeros and ones would hide a missed term."""
    generator = torch.Generator().manual_seed(options.seed(seed))
    router = DynamicRouter(SPACE, D, BUDGETS)
    with torch.no_grad():
        for tensor in (router.weight, router.bias, router.centre):
            tensor.normal_(generator=generator)
        router.scale.uniform_(0.5, 2, generator=generator)
    return router


def hidden(batch=3, tokens=50, seed=1):
    return torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(options.seed(seed)))


def policy(router, budgets, prices):
    return DynamicPolicy(router, TABLE, budgets, prices)


def choices(policy, states):
    return torch.stack([policy.choose(block, states) for block in range(len(SPACE))], -1)


def mean_cost(policy, states):
    shares = torch.nn.functional.one_hot(choices(policy, states), SPACE.num_choices).flatten(0, 1).double().mean(0)
    return float(TABLE.expected(shares) / TABLE.full)


def routed(router=None, seed=0, budgets=(0.3, 0.8, 0.9)):
    generator = torch.Generator().manual_seed(options.seed(seed))
    return RoutedPass(router or random_router(), torch.tensor(budgets), generator, temperature=0.7)


def run(passed, states):
    """All blocks of a pass: choices [B, T, 2L]."""
    return torch.stack([passed.choose(block, states) for block in range(len(SPACE))], -1)


# --- the router -------------------------------------------------------------------------------------------------


def test_the_folded_product_gives_the_logits():
    router, states, budgets = random_router(), hidden(), torch.tensor([0.3, 0.55, 1.0])
    weight, bias = router.folded(budgets)
    for block in range(len(SPACE)):
        wanted = router.logits(block, states, budgets)
        got = states @ weight[block].T + bias[:, block, None]
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
        # the attention of the first layer has no choice to skip
        assert (~wanted.isfinite()).any() == (block == 0)
    # and the standardisation is part of it
    router.centre.zero_()
    assert not torch.allclose(router.logits(1, states, budgets), states @ weight[1].T + bias[:, 1, None], atol=0.1)


def test_a_policy_without_a_price_takes_the_largest_logit():
    router, states = random_router(), hidden()
    got = choices(policy(router, [0.55], [0.0]), states)
    wanted = [router.logits(b, states, torch.full((3,), 0.55)).argmax(-1) for b in range(len(SPACE))]
    assert torch.equal(got, torch.stack(wanted, -1))
    # tokens differ
    assert all(len(column.unique()) > 1 for column in got.flatten(0, 1).unbind(-1))


def test_biases_are_those_kept_at_the_budgets_and_linear_between():
    router = random_router()
    assert torch.equal(router.biases(BUDGETS), router.bias)
    quarter = router.biases(torch.tensor([0.275]))[0]
    torch.testing.assert_close(quarter, 0.75 * router.bias[0] + 0.25 * router.bias[1])
    # outside they stay what they are at the ends
    assert torch.equal(router.biases(torch.tensor([0.1, 1.2])), router.bias[[0, -1]])
    # gradients go to the two neighbours alone
    router.biases(torch.tensor([0.275])).sum().backward()
    assert [bool(row.abs().sum()) for row in router.bias.grad] == [True, True, False, False]


def test_it_starts_with_the_static_routers_answers():
    router = DynamicRouter(SPACE, D, BUDGETS)
    answers = [SPACE.smallest(), SubNetwork((1, 2, 0, 3)), SubNetwork((0, 1, 3, 2)), SPACE.full()]
    mean, std = torch.randn(len(SPACE), D), torch.rand(len(SPACE), D) + 0.5
    std[0, 0] = 0.0
    router.start(answers, SPACE, mean, std)
    for budget, answer in zip(BUDGETS.tolist(), answers, strict=True):
        got = choices(policy(router, [budget], [0.0]), hidden())
        assert torch.equal(got, torch.tensor(answer.choices).expand_as(got))
    assert router.bias.max() == CONFIDENCE
    assert torch.equal(router.centre, mean)
    # what hardly varies is not blown up
    assert router.scale[0, 0] == pytest.approx(0.1 * std.mean().item())
    assert torch.equal(router.scale[1:], std[1:])


def test_no_gradient_reaches_the_hidden_states():
    router, states = random_router(), hidden().requires_grad_()
    router.logits(1, states, torch.tensor([0.3, 0.8, 0.9])).sum().backward()
    assert states.grad is None
    assert router.weight.grad[1].abs().sum() > 0
    assert router.weight.grad[0].abs().sum() == 0


def test_autocast_does_not_round_the_logits():
    router, states, budgets = random_router(), hidden(), torch.tensor([0.3, 0.8, 0.9])
    exact = router.logits(1, states, budgets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router.logits(1, states, budgets), exact)
        assert torch.nn.functional.linear(states, router.weight[1]).dtype == torch.bfloat16


# --- a pass of training -----------------------------------------------------------------------------------------


def test_recomputation_meets_the_same_noise_and_another_pass_does_not():
    states = hidden()
    generator = torch.Generator().manual_seed(options.seed(0))
    one, other = (
        RoutedPass(random_router(), torch.tensor([0.3, 0.8, 0.9]), generator, temperature=0.7) for _ in range(2)
    )
    first = run(one, states)
    assert torch.equal(run(one, states), first)
    # what is kept belongs to the first graph
    kept = one.chosen
    run(one, states)
    assert torch.equal(one.chosen, kept)
    assert torch.equal(kept.argmax(-1), first)
    assert not torch.equal(run(other, states), first)
    assert torch.equal(run(routed(seed=0), states), first)
    assert not torch.equal(run(routed(seed=1), states), first)


def test_choices_are_one_hot_and_only_those_that_exist():
    passed = routed()
    run(passed, hidden())
    assert passed.chosen.shape == (3, 50, len(SPACE), SPACE.num_choices)
    assert ((passed.chosen == 0) | (passed.chosen == 1)).all()
    assert (passed.chosen.sum(-1) == 1).all()
    assert not passed.chosen[..., 0, 3].any()


def test_gradients_reach_weight_and_bias_though_the_backbone_runs_without():
    passed, states = routed(), hidden().requires_grad_()
    with torch.no_grad():
        run(passed, states)
    passed.ratios(TABLE).sum().backward()
    assert (passed.router.weight.grad.flatten(1).norm(dim=1) > 0).all()
    assert (passed.router.bias.grad.flatten(2).norm(dim=2) > 0).any(0).all()
    assert states.grad is None
    # no gradient into a choice that does not exist
    assert passed.router.weight.grad.isfinite().all()
    assert not passed.router.weight.grad[0, 3].any()


def test_each_sequence_is_routed_for_its_own_budget():
    router = random_router()
    with torch.no_grad():
        # at the highest budget the widest choice, whatever the state
        router.bias[-1] = 0
        router.bias[-1, 0, 2] = router.bias[-1, 1:, 3] = 100
    passed = routed(router, budgets=(0.3, 1.0, 0.6))
    taken = run(passed, hidden())
    full = torch.tensor(SPACE.full().choices)
    assert [bool((row == full).all()) for row in taken] == [False, True, False]


def test_ratios_are_the_tables_cost_of_the_hard_choices():
    passed = routed()
    taken = run(passed, hidden())
    each = [[TABLE.ratio(SubNetwork(tuple(token))) for token in row] for row in taken.tolist()]
    wanted = torch.tensor([sum(row) / len(row) for row in each])
    assert torch.allclose(passed.ratios(TABLE), wanted, atol=1e-5)
    # one number a sequence, and they differ
    assert len(set(passed.ratios(TABLE).tolist())) == 3


def test_padding_is_refused_in_training():
    passed = routed()
    passed.begin(None)
    with pytest.raises(ValueError, match="packed text, but this batch holds padding"):
        passed.begin(torch.ones(3, 50, dtype=torch.bool))


# --- the policy -------------------------------------------------------------------------------------------------


def test_a_higher_price_never_raises_the_cost():
    router, states = random_router(), hidden(tokens=300)
    costs = [mean_cost(policy(router, [0.5], [price]), states) for price in torch.linspace(-3, 3, 40).tolist()]
    assert all(before >= after for before, after in pairwise(costs))
    assert len(set(costs)) > 30
    # at the ends every token takes the dearest or the cheapest choice
    assert mean_cost(policy(router, [0.5], [1e4]), states) == pytest.approx(TABLE.smallest_ratio)
    largest = (TABLE.fixed + sum(max(row) for row in TABLE.blocks)) / TABLE.full
    assert mean_cost(policy(router, [0.5], [-1e4]), states) == pytest.approx(largest)


def test_the_price_counts_hundredths_of_the_full_cost():
    router = random_router()
    states, price = hidden(), 0.4
    costs = torch.tensor(TABLE.blocks[1]) / TABLE.full * 100
    wanted = (router.logits(1, states, torch.full((3,), 0.5)) - price * costs).argmax(-1)
    assert torch.equal(policy(router, [0.5], [price]).choose(1, states), wanted)
    assert not torch.equal(policy(router, [0.5], [0.0]).choose(1, states), wanted)


def test_a_batch_of_several_budgets_gives_each_row_what_it_gives_alone():
    router, states = random_router(), hidden(batch=2)
    budgets, prices = (0.3, 0.9), (0.5, -0.2)
    alone = [choices(policy(router, [b], [p]), states) for b, p in zip(budgets, prices, strict=True)]
    together = choices(policy(router, budgets, prices), states)
    assert torch.equal(together, torch.stack([alone[0][0], alone[1][1]]))
    assert not torch.equal(alone[0], alone[1])
    # the beams of a sequence stand side by side
    beams = choices(policy(router, budgets, prices), states.repeat_interleave(2, 0))
    assert torch.equal(beams, together.repeat_interleave(2, 0))


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_wrong_number_of_budgets_is_one_clear_error(batch):
    with pytest.raises(ValueError, match=f"there are 2 budgets, but {batch} sequences"):
        policy(random_router(), [0.3, 0.9], [0.0, 0.0]).choose(0, hidden(batch=batch))
    # one budget is everyone's
    assert policy(random_router(), [0.3], [0.0]).choose(0, hidden(batch=batch)).shape == (batch, 50)


def test_the_policy_computes_where_and_as_the_network_does():
    rounded = DynamicPolicy(random_router(), TABLE, [0.3], [0.1], dtype=torch.bfloat16)
    assert rounded.choose(1, hidden().bfloat16()).shape == (3, 50)
    exact = policy(random_router(), [0.3], [0.1]).choose(1, hidden())
    assert (rounded.choose(1, hidden().bfloat16()) == exact).float().mean() > 0.9


# --- what was taken ---------------------------------------------------------------------------------------------


def test_the_tally_adds_up_until_it_is_taken():
    counting = policy(random_router(), [0.5], [0.0])
    for _ in range(2):
        counting.note(0, [1, 2, 0])
        counting.note(1, [0, 0, 1, 2])
    wanted = torch.tensor([[2, 4, 0, 0], [0, 0, 2, 4], [0] * 4, [0] * 4], dtype=torch.float64)
    assert torch.equal(counting.take(), wanted)
    assert not counting.take().any()


def test_the_mean_ratio_of_counts_is_the_mean_over_tokens():
    counts = torch.tensor([[1, 0, 3, 0], [4, 0, 0, 0], [0, 0, 0, 4], [2, 0, 2, 0]], dtype=torch.float64)
    costs = [
        float(row @ torch.tensor([*cost, *[0.0] * (4 - len(cost))]).double()) / 4
        for row, cost in zip(counts, TABLE.blocks, strict=True)
    ]
    assert mean_ratio(counts, TABLE) == pytest.approx((TABLE.fixed + sum(costs)) / TABLE.full)
    assert mean_ratio(3 * counts, TABLE) == pytest.approx(mean_ratio(counts, TABLE))
    full = torch.stack([SPACE.one_hot(SPACE.full())]).squeeze(0).double()
    assert mean_ratio(full, TABLE) == pytest.approx(TABLE.ratio(SPACE.full()))
