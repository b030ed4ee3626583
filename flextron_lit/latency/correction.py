"""Corrects a systematic miss of a latency table, by networks that it was not made from (ours).

What blocks save each by itself does not quite add up, so sums of savings are off in one direction, and one factor on
all savings takes most of that away. The full network saves nothing, and stays what it is; the table stays linear.
"""

from collections.abc import Sequence

Observed = tuple[float, float]
"""Time relative to the full network's: predicted, and measured."""
LEAST_ROWS = 4
"""Fewer say nothing of a system."""
SMALLEST, LARGEST = 0.5, 2.0
"""Factors beyond are noise, where nothing saves much."""


def saving_factor(rows: Sequence[Observed], largest: float = 1.0) -> float:
    """The factor on all savings that brings predictions nearest to what was measured, by least squares.

    Args:
        rows: predicted and measured times.
        largest: what the network takes that saves nothing: not 1 where routing costs.
    """
    saved = [(largest - predicted, largest - measured) for predicted, measured in rows]
    total = sum(predicted**2 for predicted, _ in saved)
    factor = sum(predicted * measured for predicted, measured in saved) / total if total else 1.0
    return min(max(factor, SMALLEST), LARGEST)


def corrected(rows: Sequence[Observed], largest: float = 1.0) -> tuple[float, list[float]]:
    """The factor that a table needs, and what it predicts of each row without having seen it.

    A factor that does not help those that it was not made from is none: it followed noise.

    Args:
        rows: as of `saving_factor`.
        largest: likewise.

    Returns:
        The factor, 1 where nothing is to be corrected; and the predictions, each corrected by the other rows alone, so
        that their errors are those of networks that the table has not seen.
    """
    before = [predicted for predicted, _ in rows]
    if len(rows) < LEAST_ROWS:
        return 1.0, before
    others = ([*rows[:index], *rows[index + 1 :]] for index in range(len(rows)))
    after = [
        largest - saving_factor(rest, largest) * (largest - predicted)
        for predicted, rest in zip(before, others, strict=True)
    ]
    if _squared(after, rows) >= _squared(before, rows):
        return 1.0, before
    return saving_factor(rows, largest), after


def _squared(predicted: Sequence[float], rows: Sequence[Observed]) -> float:
    return sum((each - measured) ** 2 for each, (_, measured) in zip(predicted, rows, strict=True))
