"""What the server counts, for Prometheus."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms by budget.

    Args:
        running: says how many requests have a slot.
        waiting: how many have none.
    """

    def __init__(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        kept: Any = {"registry": self._registry}
        self.requests = Counter("flextron_requests", "Requests by what became of them.", ["budget", "end"], **kept)
        self.refused = Counter("flextron_refused", "Requests that were refused, by status.", ["status"], **kept)
        self.gave_way = Counter("flextron_gave_way", "Answered within less, under load.", ["asked", "budget"], **kept)
        self.tokens = Counter("flextron_tokens", "Tokens of prompts and answers.", ["budget", "kind"], **kept)
        told = "Seconds from a request to its first piece."
        self.first = Histogram("flextron_first_piece_seconds", told, ["budget"], buckets=SECONDS, **kept)
        told = "Seconds from a request to its end."
        self.whole = Histogram("flextron_request_seconds", told, ["budget"], buckets=SECONDS, **kept)
        Gauge("flextron_running", "Requests with a slot.", **kept).set_function(running)
        Gauge("flextron_waiting", "Requests without one.", **kept).set_function(waiting)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
