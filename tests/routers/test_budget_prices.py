import json
import math

import pytest

from flextron_lit.routers.budget_prices import LARGEST, TOLERANCE, Priced, Prices, solve

ROWS = (Priced(0.4, 0.8, 0.401, 4.5), Priced(0.6, 0.2, 0.6, 4.0), Priced(1.0, -0.4, 0.998, 3.5))


def smooth(price):
    """Falls from 1 to 0.3."""
    return 0.65 - 0.35 * math.tanh(price / 2)


def steps(price):
    """The mean over 1,000 tokens, each of which gives way at a price of its own."""
    return 0.3 + 0.7 * sum(price < (token - 500) / 100 for token in range(1000)) / 1000


def far(price):
    """Falls at prices around 500."""
    return smooth((price - 500) / 20)


class Counted:
    """A mean cost, and the prices that it was asked for."""

    def __init__(self, function):
        self.function = function
        self.prices = []

    def __call__(self, price):
        self.prices.append(price)
        return self.function(price)


@pytest.mark.parametrize("function", [smooth, steps, far], ids=["smooth", "steps", "far"])
@pytest.mark.parametrize("guess", [0.0, 3.0, -3.0, 40.0])
@pytest.mark.parametrize("target", [0.32, 0.5, 0.65, 0.9, 0.98])
def test_the_target_is_met_from_any_guess(function, guess, target):
    price = solve(function, target, guess)
    assert abs(function(price) - target) <= TOLERANCE * target
    # and not just anything would do
    assert abs(function(price + 200) - target) > TOLERANCE * target


def test_more_than_the_router_spends_takes_a_negative_price():
    assert smooth(0.0) == pytest.approx(0.65)
    assert solve(smooth, 0.9) < 0 < solve(smooth, 0.4)


def test_a_good_guess_is_asked_for_once():
    counted = Counted(smooth)
    right = solve(smooth, 0.5)
    assert solve(counted, 0.5, guess=right) == right
    assert counted.prices == [right]


def test_the_answer_was_tried():
    # callers keep what its pass over the calibration mix found
    for function, target in ((smooth, 0.4), (smooth, 0.65), (smooth, 0.9), (jumps, 0.6)):
        counted = Counted(function)
        assert solve(counted, target) in counted.prices


def jumps(price):
    """Every token gives way at once."""
    return 0.9 if price < 0.2 else 0.4


@pytest.mark.parametrize("guess", [-7.0, 0.0, 0.2, 5.0])
def test_where_the_cost_jumps_over_the_target_the_price_is_just_past_the_jump(guess):
    price = solve(jumps, 0.6, guess)
    assert jumps(price) == 0.4
    assert price == pytest.approx(0.2, abs=1e-3)
    # what the jump lands on is met as such
    assert jumps(solve(jumps, 0.4, guess)) == 0.4
    assert jumps(solve(jumps, 0.9, guess)) == 0.9


@pytest.mark.parametrize(("target", "nearest"), [(0.2, "0.300"), (1.1, "1.000")])
def test_what_no_price_reaches_is_an_error_that_names_the_nearest(target, nearest):
    counted = Counted(smooth)
    with pytest.raises(ValueError, match=f"mean cost {target:.3f}: the nearest is {nearest}"):
        solve(counted, target)
    assert len(counted.prices) < 20
    assert max(map(abs, counted.prices)) > LARGEST / 2


def test_prices_are_those_stored_and_linear_between():
    prices = Prices(ROWS)
    assert [prices.at(row.budget) for row in ROWS] == [row.price for row in ROWS]
    assert prices.at(0.45) == pytest.approx(0.75 * 0.8 + 0.25 * 0.2)
    assert prices.at(0.8) == pytest.approx(-0.1)
    # a router may do with less than the full cost
    assert prices.at(1.5) == -0.4


def test_a_budget_below_the_lowest_is_refused_with_one_that_is_met():
    prices = Prices((Priced(0.4004, 0.8, 0.4, 4.5), *ROWS[1:]))
    with pytest.raises(ValueError, match=r"meets budgets of 0.401 and more, not 0.4: .* take a static router"):
        prices.at(0.4)
    assert prices.at(0.401) < 0.8


def test_prices_come_back_from_json():
    prices = Prices(ROWS)
    again = Prices.from_json(json.loads(json.dumps(prices.to_json())))
    assert again == prices
    assert Prices.from_json(prices.to_json()[:2]) != prices
