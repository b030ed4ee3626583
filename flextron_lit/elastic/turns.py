"""Who runs a network that several threads hold: many as it stands, or one alone that changes it."""

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

Kind = Literal["pass", "call", "set", "open"]
"""One pass, a generation, a change that stays, or whatever a caller likes to do inside `use`."""
PATIENCE = 30.0
"""Seconds to wait for one that has the network and does nothing with it: it may be waiting for the one that waits."""
REFUSED = (
    "another thread or task is using this elastic backbone with its own selection{since}; take turns, give each a "
    "backbone of its own, or let each call say what it wants, which is waited for: generate(..., budget=0.6)"
)


class Turns:
    """Turns of threads, and of asyncio's tasks in a thread, in the order in which they ask.

    A pass or a generation ends by itself and is waited for. `use` is not: whoever is inside may be waiting for the one
    that asks. A turn within one's own turn is granted at once.
    """

    def __init__(self, *, together: bool = True) -> None:
        self.together = together
        """Whether several may run the network as it stands at the same time; who has it alone may change that."""
        self._changed = threading.Condition()
        self._holders: Counter[Hashable] = Counter()
        self._kinds: Counter[Kind] = Counter()
        self._alone = 0
        self._widening = False
        self._queue: deque[object] = deque()
        self._begun = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is for another network, which nobody runs."""
        return _free, (self.together,)

    @property
    def taken(self) -> bool:
        """Whether somebody has the network alone."""
        return bool(self._alone)

    @property
    def mid_call(self) -> bool:
        """Whether whoever has the network alone is in the middle of a pass or a generation."""
        return bool(self._kinds["pass"] or self._kinds["call"])

    @contextmanager
    def turn(self, kind: Kind, *, alone: bool = False) -> Iterator[None]:
        """Have the network inside.

        Args:
            kind: what for.
            alone: so that it may be changed.

        Raises:
            RuntimeError: if another is inside `use`, or does nothing with the network for as long as `PATIENCE`.
        """
        runner = _runner()
        with self._changed:
            self._wait(runner, alone)
            alone = alone or not self.together
            if kind == "open" and self.mid_call:
                # ends with the call that it is a part of
                kind = "call"
            self._count(runner, kind, alone, 1)
            self._begun += 1
        try:
            yield
        finally:
            with self._changed:
                # a generator may be closed by another thread than began it
                self._count(runner, kind, alone, -1)
                self._changed.notify_all()

    def _count(self, runner: Hashable, kind: Kind, alone: bool, change: int) -> None:
        self._kinds[kind] += change
        self._alone += change * alone
        self._holders[runner] += change
        if not self._holders[runner]:
            del self._holders[runner]

    def _wait(self, runner: Hashable, alone: bool) -> None:
        """Until the turn is the runner's."""
        if runner in self._holders:
            while not self._fits(runner, alone):
                if self._widening:
                    # two that run it together would each wait for the other to end
                    raise RuntimeError(REFUSED.format(since=""))
                self._widening = True
                try:
                    self._be_patient()
                finally:
                    self._widening = False
            return
        place = object()
        self._queue.append(place)
        try:
            while self._queue[0] is not place or not self._fits(runner, alone):
                if self._kinds["open"]:
                    raise RuntimeError(REFUSED.format(since=""))
                self._be_patient()
        finally:
            self._queue.remove(place)
            self._changed.notify_all()

    def _fits(self, runner: Hashable, alone: bool) -> bool:
        others = len(self._holders) - (runner in self._holders)
        return not others or not (self._alone or alone or not self.together)

    def _be_patient(self) -> None:
        begun = self._begun
        if not self._changed.wait(PATIENCE) and begun == self._begun and not self._kinds["pass"]:
            raise RuntimeError(REFUSED.format(since=f" and has not run it for {PATIENCE:g} s"))


def _free(together: bool) -> Turns:
    return Turns(together=together)


def _runner() -> Hashable:
    try:
        return asyncio.current_task() or threading.current_thread()
    except RuntimeError:
        # no event loop runs in this thread
        return threading.current_thread()
