import pytest

from flextron_lit.latency.drift import Drift, Fresh
from flextron_lit.latency.miss import points, told


def drift(*misses, spread=0.0, known=0.0):
    return Drift([Fresh(0.7, 0.7 + miss, spread) for miss in misses], known)


def test_mean_has_a_sign_and_largest_has_none():
    found = drift(0.01, -0.04, 0.0, spread=0.005)
    assert found.mean == pytest.approx(-0.01)
    assert found.largest == pytest.approx(0.04)
    assert found.spread == pytest.approx(0.005)
    assert found.told() == "3 fresh networks are off by -1.0 on average and 4.0 points at most, measured to ± 0.5"


@pytest.mark.parametrize(
    ("misses", "settings", "holds"),
    [
        ((0.02, -0.029), {}, True),
        ((0.0, 0.04), {}, False),
        ((0.0, -0.04), {}, False),
        # noise explains as much as it says
        ((0.0, 0.04), {"spread": 0.02}, True),
        # so does what the table says of itself, but not of all networks together
        ((0.0, 0.04), {"known": 0.045}, True),
        ((0.04, 0.04), {"known": 0.045}, False),
        ((0.04, 0.04), {"known": 0.045, "spread": 0.02}, True),
        ((0.0, 0.05), {"known": 0.045}, False),
    ],
)
def test_a_table_holds_within_three_points_beyond_the_noise(misses, settings, holds):
    assert drift(*misses, **settings).holds == holds


def test_misses_are_told_in_points():
    assert points(0.0214) == "2.1 points"
    assert told({"latency": 0.0214, "decode": 0.01}) == (
        "may miss latency by 2.1 points, decode by 1.0 points of the full network's"
    )
    assert told({}) == ""
