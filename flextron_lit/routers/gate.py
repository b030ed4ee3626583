"""Whether a surrogate is good enough to train a router by (paper: routers move below an error threshold only)."""

from collections import deque
from collections.abc import Iterable
from typing import Any


class Gate:
    """Open while a surrogate predicts recent on-policy pairs well; with hysteresis, so that it does not flutter.

    The error is the mean squared error over the variance of what was observed (1: no better than the mean), over the
    last `window` pairs, each predicted before the surrogate was trained on it (ours; the paper has a plain threshold).

    Args:
        threshold: it opens below this error.
        hysteresis: it closes above `threshold * hysteresis`.
        window: pairs that count; closed until half of them are there.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, threshold: float = 0.1, hysteresis: float = 1.5, window: int = 16) -> None:
        if threshold <= 0 or hysteresis < 1 or window < 4:
            raise ValueError(
                "the gate needs a threshold above 0, a hysteresis of 1 or more and a window of 4 pairs or more, "
                f"not {threshold}, {hysteresis}, {window}"
            )
        self.threshold = threshold
        self.hysteresis = hysteresis
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)
        self.open = False

    def observe(self, pairs: Iterable[tuple[float, float]]) -> None:
        """Take in (predicted, observed) pairs, and open or close."""
        self.recent.extend(pairs)
        error = self.error
        if error is None:
            return
        limit = self.threshold * self.hysteresis if self.open else self.threshold
        self.open = error < limit

    @property
    def wanted(self) -> int:
        """Pairs that are missing before it can open."""
        return max(0, (self.recent.maxlen or 0) // 2 - len(self.recent))

    @property
    def error(self) -> float | None:
        """Squared error over variance; None while there are too few pairs."""
        if self.wanted:
            return None
        observed = [o for _, o in self.recent]
        mean = sum(observed) / len(observed)
        variance = sum((o - mean) ** 2 for o in observed)
        return sum((p - o) ** 2 for p, o in self.recent) / max(variance, 1e-12)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"recent": [list(pair) for pair in self.recent], "open": self.open}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.recent.clear()
        self.recent.extend(map(tuple, state["recent"]))
        self.open = state["open"]
