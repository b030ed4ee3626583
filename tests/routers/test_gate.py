import pytest

from flextron_lit.routers.gate import Gate

GOOD = [(x, x + 0.01) for x in (1.0, 2.0, 3.0, 4.0)]
BAD = [(4.0, 1.0), (1.0, 4.0), (3.0, 2.0), (2.0, 3.0)]


def test_it_stays_closed_until_half_the_window_is_there():
    gate = Gate(window=8)
    assert gate.wanted == 4
    gate.observe(GOOD[:3])
    assert not gate.open
    assert gate.error is None
    gate.observe(GOOD[3:])
    assert gate.open
    assert gate.wanted == 0


def test_the_error_is_squared_error_over_variance():
    gate = Gate(window=4)
    gate.observe([(2.5, x) for x in (1.0, 2.0, 3.0, 4.0)])
    assert gate.error == pytest.approx(1.0)


def test_bad_predictions_keep_it_closed_and_good_ones_open_it():
    gate = Gate(window=4)
    gate.observe(BAD)
    assert not gate.open
    gate.observe(GOOD)
    assert gate.open
    gate.observe(BAD)
    assert not gate.open


def test_between_the_two_thresholds_it_stays_as_it_is():
    # errors of observed 0, 1, 2, 3 (sum of squares around the mean 5) that are off by d each: 4 d^2 / 5
    between = [(x + 0.4, x) for x in (0.0, 1.0, 2.0, 3.0)]
    gates = [Gate(threshold=0.1, hysteresis=1.5, window=4) for _ in range(2)]
    gates[0].observe(GOOD)
    for gate in gates:
        gate.observe(between)
        assert gate.error == pytest.approx(0.128)
    assert [gate.open for gate in gates] == [True, False]


def test_state_comes_back():
    gate = Gate(window=4)
    gate.observe(GOOD)
    other = Gate(window=4)
    other.load_state_dict(gate.state_dict())
    assert other.open
    assert other.error == gate.error


@pytest.mark.parametrize("settings", [{"threshold": 0}, {"hysteresis": 0.5}, {"window": 2}])
def test_a_number_out_of_range_is_refused(settings):
    with pytest.raises(ValueError, match="the gate needs"):
        Gate(**settings)
