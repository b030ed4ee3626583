"""By how much a latency may miss what a table says of it, in words."""

from collections.abc import Mapping

PROMISED = 0.03
"""Of the full network's time: how near a latency budget is kept."""


def points(share: float) -> str:
    """A share of the full network's time, for people: 2.1 points."""
    return f"{100 * share:.1f} points"


def told(may_miss: Mapping[str, float]) -> str:
    """What to say beside an answer; nothing where no latency was checked.

    Args:
        may_miss: the largest misses of latencies, by name, as `LatencyTable.may_miss` has them.
    """
    parts = [f"{name} by {points(share)}" for name, share in may_miss.items()]
    return f"may miss {', '.join(parts)} of the full network's" if parts else ""
