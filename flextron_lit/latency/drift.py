"""Whether a latency table still holds: what it predicts of fresh networks, beside what they take now (ours)."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from flextron_lit.latency.miss import PROMISED, points


@dataclass(frozen=True)
class Fresh:
    """A network that a table was neither made from nor checked on; times are relative to the full network's."""

    predicted: float
    measured: float
    spread: float
    """Of what was measured, as of a `Ratio`."""

    @property
    def miss(self) -> float:
        """Above 0 where it takes longer than the table says."""
        return self.measured - self.predicted


@dataclass(frozen=True)
class Drift:
    """How far a latency has gone from its table."""

    rows: Sequence[Fresh]
    """At least one."""
    known: float = 0.0
    """The largest miss that the table has said itself."""

    @property
    def mean(self) -> float:
        """Mean miss, with its sign: all together are slower, or faster."""
        return fmean(row.miss for row in self.rows)

    @property
    def largest(self) -> float:
        """Largest miss in either direction."""
        return max(abs(row.miss) for row in self.rows)

    @property
    def spread(self) -> float:
        """Mean spread of what was measured."""
        return fmean(row.spread for row in self.rows)

    @property
    def holds(self) -> bool:
        """Whether nothing is off by more than the noise of measuring and `PROMISED` explain.

        One network may be off by as much as the table has said of itself: measuring anew would not better that.
        """
        allowed = max(PROMISED, self.known)
        single = all(abs(row.miss) - row.spread <= allowed for row in self.rows)
        return single and abs(self.mean) - self.spread <= PROMISED

    def told(self) -> str:
        """In words."""
        off = f"{100 * self.mean:+.1f} on average and {points(self.largest)} at most"
        return f"{len(self.rows)} fresh networks are off by {off}, measured to ± {100 * self.spread:.1f}"
