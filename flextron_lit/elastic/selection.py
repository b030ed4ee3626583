"""The one place that knows which sub-network is active."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from flextron_lit.space import ElasticSpace, SubNetwork


class Policy(Protocol):
    """Chooses at run time, block by block; a `SubNetwork` is the constant policy."""

    def choose(self, block: int, hidden_states: Tensor) -> int:
        """Choice index of a block for its own input, [B, T, D]."""
        ...


Selection = SubNetwork | Policy


class ActiveSelection:
    """Shared by all elastic modules of one backbone: they ask `width`, `use` answers.

    A plain attribute and not a context variable: backward on CUDA runs on another thread, and activation
    checkpointing recomputes the forward there.
    """

    def __init__(self, space: ElasticSpace) -> None:
        self.space = space
        self.current: Selection = space.full()
        self._owner: int | None = None

    def width(self, block: int, hidden_states: Tensor) -> int:
        """Units that a block uses for this input."""
        selection = self.current
        if isinstance(selection, SubNetwork):
            choice = selection.choices[block]
        else:
            choice = selection.choose(block, hidden_states)
        return self.space.blocks[block].widths[choice]

    def set(self, selection: Selection) -> None:
        """Make a selection active until another is set; `use` inside takes its turn and gives back.

        Raises:
            ValueError: if a sub-network belongs to another space.
        """
        if isinstance(selection, SubNetwork):
            self.space.check(selection)
        self.current = selection

    @contextmanager
    def use(self, selection: Selection) -> Iterator[None]:
        """Make a selection active; forward and backward of one pass both belong inside.

        Raises:
            ValueError: if a sub-network belongs to another space.
            RuntimeError: if another thread is inside `use`.
        """
        if isinstance(selection, SubNetwork):
            self.space.check(selection)
        thread = threading.get_ident()
        if self._owner not in (None, thread):
            raise RuntimeError(
                "another thread is using this elastic backbone with its own selection; "
                "give each thread a backbone of its own, or take turns"
            )
        previous = self.current, self._owner
        self.current, self._owner = selection, thread
        try:
            yield
        finally:
            self.current, self._owner = previous
