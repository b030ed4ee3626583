import itertools
import math

import pytest
import torch

from flextron_lit.costs import CostTable
from flextron_lit.routers import feasible_decoding as decoding
from flextron_lit.routers import ladder as ladders
from flextron_lit.routers.excess import POWER, ExcessTable
from flextron_lit.routers.feasible_decoding import LEAST_GAIN, Additive, Bound, decode, repair, spend
from flextron_lit.routers.ladder import Ladder, Rung, build_ladder, climb, measured_ladder, narrowed, worth_measuring
from flextron_lit.routers.static import StaticRouter
from flextron_lit.space import SpaceConfig, SubNetwork, resolve
from tests import options

SPACE = resolve(SpaceConfig(mlp=[0, 16, 32, 64], attention=[1, 2, 4]), num_layers=3, neurons=64, kv_groups=4)
FULL_LOSS = 3.0


def table(seed, name="units", *, monotone=True):
    generator = torch.Generator().manual_seed(options.seed(seed))
    rows = [torch.rand(len(block.widths), generator=generator) + 0.1 for block in SPACE.blocks]
    rows = [row.sort().values if monotone else row for row in rows]
    return CostTable(name, "units", 1.0, tuple(tuple(row.tolist()) for row in rows))


EFFECTS = torch.rand(6, 4, generator=torch.Generator().manual_seed(options.seed(9))).sort(-1, descending=True).values


class Slowly:
    """A prediction that knows no single changes but by trying each."""

    def __init__(self, function):
        self.function = function

    def __call__(self, one_hot):
        return self.function(one_hot)

    def after_changes(self, choices):
        blocks, num_choices = choices.shape[1], SPACE.num_choices
        now = torch.nn.functional.one_hot(choices, num_choices).float()
        every = now[:, None, None].repeat(1, blocks, num_choices, 1, 1)  # [R, changed block, its choice, 2L, N]
        block = torch.arange(blocks)
        every[:, block, :, block] = torch.eye(num_choices)
        return self(every)


@Slowly
def predict(one_hot):
    """Additive, and a coupling of the first two MLPs."""
    each = (one_hot * EFFECTS).sum(-1)
    return each.sum(-1) + each[..., 1] * each[..., 3]


def loss_of(sub_network):
    return predict(SPACE.one_hot(sub_network)).item()


def every_sub_network():
    return [SubNetwork(c) for c in itertools.product(*(range(len(block.widths)) for block in SPACE.blocks))]


def ladder_of(costs, seed=0):
    router = StaticRouter(SPACE, 16, torch.Generator().manual_seed(options.seed(seed)))
    router.scale_to(costs)
    return build_ladder(router, SPACE, costs, predict, to_nats=lambda p: FULL_LOSS + p, full_loss=FULL_LOSS)


def random_choices(rows, seed):
    generator = torch.Generator().manual_seed(options.seed(seed))
    return torch.tensor([SPACE.random(generator).choices for _ in range(rows)])


@pytest.mark.parametrize("monotone", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_budgets_are_met_and_more_budget_never_predicts_more_loss(seed, monotone):
    costs = table(seed, monotone=monotone)
    ladder = ladder_of(costs, seed)
    low, high = costs.smallest, costs.full
    limits = sorted(
        low + (high - low) * torch.rand(1000, generator=torch.Generator().manual_seed(options.seed(seed))).double()
    )
    answers = [ladder.at(float(limit)) for limit in limits]
    for limit, rung in zip(limits, answers, strict=True):
        assert costs.cost(rung.sub_network) <= limit
        assert rung.cost == costs.cost(rung.sub_network)
    losses = [rung.loss for rung in answers]
    assert all(before >= after for before, after in itertools.pairwise(losses))
    assert ladder.at(high).sub_network == SPACE.full()
    assert ladder.at(2 * high).loss == FULL_LOSS
    with pytest.raises(ValueError, match="the smallest costs"):
        ladder.at(low * 0.99)


def test_the_bare_router_exceeds_budgets_that_the_ladder_meets():
    costs = table(0)
    router = StaticRouter(SPACE, 16, torch.Generator().manual_seed(options.seed(0)))
    budgets = torch.linspace(costs.smallest / costs.full, 1, 50)
    raw = [SubNetwork(tuple(row)) for row in router(budgets).argmax(-1).tolist()]
    assert any(costs.ratio(sub_network) > budget for sub_network, budget in zip(raw, budgets.tolist(), strict=True))


def gaps(costs, choices, values, loss):
    """By how much every row loses more than the best of all sub-networks within its bound."""
    everything = [(costs.cost(s), loss(s)) for s in every_sub_network()]
    return [
        loss(SubNetwork(tuple(row))) - min(each for cost, each in everything if cost <= value)
        for row, value in zip(choices.tolist(), values.tolist(), strict=True)
    ]


def test_decoding_finds_the_best_of_all_sub_networks_where_steps_are_worth_less_and_less(monkeypatch):
    # every step up costs 1 and gains less than the one before: where no step and no exchange of two steps helps,
    # nothing does (separable and concave), but for the least gain of each of the 15 steps that there are
    costs = CostTable("steps", "units", 1.0, tuple(tuple(map(float, range(len(b.widths)))) for b in SPACE.blocks))
    gained = torch.rand(6, 3, generator=torch.Generator().manual_seed(options.seed(9))).sort(-1, descending=True).values
    effects = torch.cat([torch.zeros(6, 1), -gained.cumsum(-1)], -1)

    def loss(sub_network):
        return (SPACE.one_hot(sub_network) * effects).sum().item()

    values = torch.linspace(1, 16, 16).double()
    choices, feasible = decode(SPACE, random_choices(16, 3), [Bound(costs, values)], Additive(effects))
    assert feasible.all()
    found = gaps(costs, choices, values, loss)
    assert min(found) >= 0
    assert max(found) <= 15 * LEAST_GAIN + 1e-5
    # without exchanges, a budget that is spent on the wrong block stays there
    last = SPACE.smallest().replace(5, 1).choices
    wrong = Additive(torch.cat([torch.zeros(6, 1), -torch.arange(6.0, 0, -1)[:, None].expand(6, 3)], -1))
    two = [Bound(costs, torch.tensor([2.0]).double())]
    assert spend(SPACE, torch.tensor([last]), two, wrong).tolist() == [list(SPACE.smallest().replace(0, 1).choices)]
    monkeypatch.setattr(decoding, "_exchange", lambda active, rows, *_: (active[:0], rows[:0]))
    assert spend(SPACE, torch.tensor([last]), two, wrong).tolist() == [list(last)]


def test_decoding_ends_where_no_change_of_one_block_helps():
    costs = table(1)
    values = torch.linspace(costs.smallest * 1.05, costs.full * 0.95, 12).double()
    choices, feasible = decode(SPACE, random_choices(12, 3), [Bound(costs, values)], predict)
    assert feasible.all()
    assert min(gaps(costs, choices, values, loss_of)) >= 0
    for row, value in zip(choices.tolist(), values.tolist(), strict=True):
        found = SubNetwork(tuple(row))
        assert costs.cost(found) <= value + 1e-9
        for block, choice in itertools.product(range(6), range(4)):
            if choice < len(SPACE.blocks[block].widths):
                other = found.replace(block, choice)
                assert costs.cost(other) > value - 1e-9 or loss_of(other) >= loss_of(found) - LEAST_GAIN - 1e-5


def test_spending_never_raises_what_is_predicted_nor_breaks_a_bound():
    costs = table(2)
    start = random_choices(20, 1)
    values = torch.tensor([costs.cost(SubNetwork(tuple(row))) for row in start.tolist()]) * 1.2
    spent = spend(SPACE, start, [Bound(costs, values.double())], predict)
    for before, after, value in zip(start.tolist(), spent.tolist(), values.tolist(), strict=True):
        assert loss_of(SubNetwork(tuple(after))) <= loss_of(SubNetwork(tuple(before)))
        assert costs.cost(SubNetwork(tuple(after))) <= value
    assert not torch.equal(start, spent)


def test_what_is_feasible_is_not_repaired():
    costs = table(2)
    start = random_choices(20, 1)
    enough = torch.full((20,), costs.full).double()
    assert torch.equal(repair(SPACE, start, [Bound(costs, enough)], predict), start)
    tight = torch.full((20,), costs.smallest * 1.1).double()
    repaired = repair(SPACE, start, [Bound(costs, tight)], predict)
    assert (Bound(costs, tight).costs(repaired) <= tight).all()


def test_several_bounds_hold_at_once():
    one, other = table(3, "one"), table(4, "other")
    bounds = [Bound(t, torch.full((8,), 0.6 * t.full).double()) for t in (one, other)]
    choices, feasible = decode(SPACE, random_choices(8, 5), bounds, predict)
    assert feasible.all()
    for row in choices.tolist():
        assert all(t.ratio(SubNetwork(tuple(row))) <= 0.6 for t in (one, other))


def test_climbing_drops_what_costs_more_and_predicts_no_less():
    each = zip([(1, 5), (2, 6), (3, 4), (3, 4.5)], every_sub_network(), strict=False)
    # the losses shown may be alike; what counts is what was predicted
    candidates = [(predicted, Rung(cost, FULL_LOSS, sub_network)) for (cost, predicted), sub_network in each]
    assert climb(candidates).rungs == (candidates[0][1], candidates[2][1])


def test_a_sum_of_effects_knows_its_single_changes():
    start, additive = random_choices(5, 7), Additive(EFFECTS)
    bounds = [Bound(table(5), torch.full((5,), table(5).full * 0.6).double())]
    told = repair(SPACE, start, bounds, additive)
    assert torch.equal(told, repair(SPACE, start, bounds, Slowly(additive)))
    assert not torch.equal(told, repair(SPACE, start, bounds, Additive(-EFFECTS)))


def test_narrowing_meets_a_bound_where_the_router_minds_least():
    costs, generator = table(6), torch.Generator().manual_seed(options.seed(2))
    logits = torch.randn(6, 4, generator=generator).masked_fill(~SPACE.exists, -torch.inf)
    wide = SubNetwork(tuple(logits.argmax(-1).tolist()))
    assert narrowed(logits, SPACE, Bound(costs, torch.tensor([costs.cost(wide)], dtype=torch.float64))) == wide
    for share in (0.9, 0.7, 0.5):
        limit = costs.smallest + share * (costs.cost(wide) - costs.smallest)
        answer = narrowed(logits, SPACE, Bound(costs, torch.tensor([limit], dtype=torch.float64)))
        assert costs.cost(answer) <= limit < costs.cost(wide)
        SPACE.check(answer)
        changed = [i for i, (a, b) in enumerate(zip(answer.choices, wide.choices, strict=True)) if a != b]
        assert 0 < len(changed) <= 6
        # a router that is sure of a block is not asked to give that one up first
        sure = logits.clone()
        sure[changed[0]] += 1e6 * torch.nn.functional.one_hot(logits[changed[0]].argmax(), 4)
        kept = narrowed(sure, SPACE, Bound(costs, torch.tensor([limit], dtype=torch.float64)))
        # unless all others together cannot save enough
        least = SPACE.smallest().replace(changed[0], wide.choices[changed[0]])
        assert (kept.choices[changed[0]] == wide.choices[changed[0]]) == (costs.cost(least) <= limit)
        assert costs.cost(kept) <= limit


@pytest.fixture
def series():
    """Of an untrained router and the ladder of a surrogate, for table 0."""
    costs = table(0)
    router = StaticRouter(SPACE, 16, torch.Generator().manual_seed(options.seed(0)))
    router.scale_to(costs)
    return ladders.candidates(router, SPACE, costs, ladder_of(costs))


def test_what_may_become_a_rung_has_both_ends(series):
    costs = table(0)
    answers, rungs = series
    assert costs.cost(answers[0]) == pytest.approx(costs.smallest)
    assert rungs == [rung.sub_network for rung in ladder_of(costs).rungs]
    assert rungs[-1] == SPACE.full()
    assert all([costs.cost(each) for each in own] == sorted(costs.cost(each) for each in own) for own in series)
    # a ladder that was measured may end below the full network
    cut = Ladder(ladder_of(costs).rungs[:-3], measured=True)
    router = StaticRouter(SPACE, 16, torch.Generator().manual_seed(options.seed(0)))
    assert ladders.candidates(router, SPACE, costs, cut, budgets=3)[1][-1] == SPACE.full()


def test_the_ladder_is_not_behind_what_the_excess_losses_answer():
    """An untrained router and the ladder of a surrogate that is wrong, beside excess losses that are right."""
    costs = table(0)
    router = StaticRouter(SPACE, 16, torch.Generator().manual_seed(options.seed(0)))
    router.scale_to(costs)
    wrong = build_ladder(
        router, SPACE, costs, Additive(1 - EFFECTS), to_nats=lambda p: FULL_LOSS + p, full_loss=FULL_LOSS
    )

    def true(sub_network):
        return Additive(EFFECTS)(SPACE.one_hot(sub_network)).item()

    found = {}
    # so that their objective is what is true
    rows = zip(SPACE.blocks, EFFECTS ** (1 / POWER), strict=True)
    right = ExcessTable(tuple(tuple(row[: len(block.widths)].tolist()) for block, row in rows), 1)
    for excess in (None, right):
        series = ladders.candidates(router, SPACE, costs, wrong, excess)
        assert len(series) == (2 if excess is None else 3)
        chosen = {each for own in series for each in own}
        found[excess is None] = measured_ladder(costs, series, {each: true(each) for each in chosen})
    behind = 0.0
    for ratio in torch.linspace(costs.smallest_ratio, 1.0, 20, dtype=torch.float64).tolist():
        limit = Bound(costs, torch.tensor([ratio * costs.full], dtype=torch.float64))
        choices, _ = decode(SPACE, torch.tensor([SPACE.full().choices]), [limit], Additive(EFFECTS))
        answer = true(SubNetwork(tuple(choices[0].tolist())))
        assert found[False].at(ratio * costs.full).loss <= answer + 1e-3
        behind = max(behind, found[True].at(ratio * costs.full).loss - answer)
    assert behind > 0.2


def test_what_is_worth_measuring_is_spread_over_both_series(series):
    chosen = worth_measuring(series, 30)
    assert len(chosen) == len(set(chosen)) <= 30
    assert {own[end] for own in series for end in (0, -1)} <= set(chosen)
    assert all(len(set(own) & set(chosen)) >= min(len(own), 15) for own in series)
    places = [place for place, each in enumerate(series[1]) if each in chosen]
    assert max(b - a for a, b in itertools.pairwise(places)) <= math.ceil(len(series[1]) / 14)


def test_a_measured_ladder_uses_what_was_not_measured_too(series):
    costs = table(0)
    chosen = worth_measuring(series, 12)
    losses = {each: 1 + loss_of(each) for each in chosen}
    ladder = measured_ladder(costs, series, losses)
    assert ladder.measured
    assert all(a.loss > b.loss and a.cost < b.cost for a, b in itertools.pairwise(ladder.rungs))
    for rung in ladder.rungs:
        assert rung.sub_network in losses or any(rung.sub_network in own for own in series)
        assert rung.loss == losses.get(rung.sub_network, rung.loss)
    # what was not measured: between its neighbours' losses, by cost
    expected = {}
    for own in series:
        known = [each for each in own if each in losses]
        for below, above in itertools.pairwise(known):
            for inner in own[own.index(below) + 1 : own.index(above)]:
                share = (costs.cost(inner) - costs.cost(below)) / (costs.cost(above) - costs.cost(below))
                between = losses[below] + share * (losses[above] - losses[below])
                expected[inner] = min(between, expected.get(inner, math.inf))
    assert len(expected) > len(chosen)
    # nothing is left out but what a rung that costs no more is as good as
    for each, loss in (expected | losses).items():
        best = ladder.at(costs.cost(each))
        assert best.loss <= loss + 1e-6
        assert best.sub_network != each or best.loss == pytest.approx(loss)
    # a series of rungs that measure as they were predicted is kept whole, what was not measured with it
    kept = {rung.sub_network for rung in measured_ladder(costs, series[1:], losses).rungs}
    assert kept == set(series[1])
    assert kept - set(losses)


def test_a_measured_ladder_ends_where_more_cost_does_not_help(series):
    costs = table(0)
    chosen = worth_measuring(series, 30)
    best = sorted(chosen, key=costs.cost)[-5]
    losses = {each: 0.5 if each == best else 1 + loss_of(each) for each in chosen}
    assert measured_ladder(costs, series, losses).rungs[-1] == Rung(costs.cost(best), 0.5, best)


def test_predictions_below_the_full_network_still_order_the_ladder():
    costs = table(0)
    router = StaticRouter(SPACE, 16, torch.Generator().manual_seed(options.seed(0)))
    router.scale_to(costs)
    # everything is predicted to be better than the full network, wide ones most of all
    ladder = build_ladder(router, SPACE, costs, predict, to_nats=lambda p: FULL_LOSS - 9 + 0 * p, full_loss=FULL_LOSS)
    assert {rung.loss for rung in ladder.rungs} == {FULL_LOSS}
    assert len(ladder.rungs) > 20
    assert loss_of(ladder.rungs[-2].sub_network) < loss_of(ladder.rungs[0].sub_network)


def test_a_cost_that_is_the_same_for_all_is_refused():
    flat = CostTable("flat", "units", 1.0, tuple((1.0,) * len(block.widths) for block in SPACE.blocks))
    with pytest.raises(ValueError, match="every sub-network has the same flat"):
        StaticRouter(SPACE, 16, torch.Generator()).scale_to(flat)


def test_a_ladder_comes_back_from_json():
    ladder = ladder_of(table(0))
    rows = ladder.to_json()
    assert Ladder.from_json(rows) == ladder
    # best first
    assert rows[0]["loss"] == min(row["loss"] for row in rows)
