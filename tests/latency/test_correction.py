import pytest

from flextron_lit.latency.correction import corrected, saving_factor

SAVED = (0.05, 0.15, 0.25, 0.35, 0.45)


def rows(law, largest=1.0):
    """Predicted and measured, where what is measured follows from what a table says is saved."""
    return [(largest - saved, largest - law(saved)) for saved in SAVED]


@pytest.mark.parametrize("largest", [1.0, 1.08])
@pytest.mark.parametrize("factor", [0.85, 1.1])
def test_a_factor_on_all_savings_is_found_and_takes_the_miss_away(factor, largest):
    biased = rows(lambda saved: factor * saved, largest)
    assert saving_factor(biased, largest) == pytest.approx(factor)
    found, predicted = corrected(biased, largest)
    assert found == pytest.approx(factor)
    # each is predicted from the others
    assert predicted == pytest.approx([measured for _, measured in biased])
    # the control: as the table had it they are off
    assert max(abs(p - m) for p, m in biased) > 0.04


def test_the_network_that_saves_nothing_says_nothing_of_savings():
    assert saving_factor([(1.0, 0.97)]) == 1.0
    assert saving_factor([(1.0, 0.97), (0.8, 0.9)]) == pytest.approx(0.5)


def test_it_is_the_factor_of_least_squares():
    noisy = rows(lambda saved: 0.9 * saved + 0.01 * (-1) ** round(10 * saved))

    def squares(factor):
        return sum((1 - factor * (1 - p) - m) ** 2 for p, m in noisy)

    found = saving_factor(noisy)
    assert squares(found) < min(squares(found - 1e-3), squares(found + 1e-3))


def test_what_helps_no_other_row_is_noise():
    even = [(1 - saved, 1 - saved + sign) for saved, sign in zip(SAVED, (0.02, -0.02, 0.02, -0.02, 0.02), strict=True)]
    assert saving_factor(even) != 1
    assert corrected(even) == (1.0, [predicted for predicted, _ in even])


def test_a_few_rows_correct_nothing():
    few = rows(lambda saved: 0.8 * saved)[:3]
    assert corrected(few) == (1.0, [predicted for predicted, _ in few])
    assert corrected([]) == (1.0, [])


@pytest.mark.parametrize(("law", "factor"), [(lambda _: -0.2, 0.5), (lambda saved: 9 * saved, 2.0)])
def test_a_factor_stays_in_reason(law, factor):
    assert saving_factor(rows(law)) == factor
