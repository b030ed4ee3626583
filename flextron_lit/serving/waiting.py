"""Who is next: a line for every budget, and the budget with the fewest running has the next free slot."""

from collections import deque
from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Waiting(Generic[Job]):
    """Lines in which jobs wait, in the order in which they came."""

    def __init__(self) -> None:
        # the line that was served longest ago stands first
        self._lines: dict[Hashable, deque[Job]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, budget: Hashable, job: Job) -> None:
        """Have a job wait in the line of its budget."""
        self._lines.setdefault(budget, deque()).append(job)

    def take(self, running: Mapping[Hashable, int]) -> Job | None:
        """The job that is next, or None if none waits.

        Args:
            running: how many jobs of each budget run already.
        """
        budget = min(self._lines, key=lambda each: running.get(each, 0), default=None)
        if budget is None:
            return None
        line = self._lines.pop(budget)
        job = line.popleft()
        if line:
            self._lines[budget] = line
        return job

    def remove(self, job: Job) -> bool:
        """Forget a job; whether it waited."""
        for budget, line in self._lines.items():
            if job in line:
                line.remove(job)
                if not line:
                    del self._lines[budget]
                return True
        return False
