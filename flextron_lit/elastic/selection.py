"""The one place that knows which sub-network is active."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flextron_lit.elastic.grouping import TokenGroups, group
from flextron_lit.elastic.turns import Turns
from flextron_lit.space import ElasticSpace, SubNetwork


class Policy(Protocol):
    """Chooses at run time, for every token and block by block: a dynamic router does.

    Those that inherit have to choose; what else they are told is nothing to them unless they say so.
    """

    def begin(self, real: Tensor | None) -> None:
        """A forward pass begins: which tokens are no padding, bool [B, T]; None means all."""
        return

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """Choice index of every token for a block's own input [B, T, D]: int64 [B, T].

        Asked again for the same input when checkpointed activations are recomputed; it must answer the same.
        """

    def note(self, block: int, counts: list[int]) -> None:
        """Tokens that took each choice of a block, padding left out."""
        return


class CountingPolicy(Policy, Protocol):
    """A policy that adds up how many tokens took each choice, since it was made or last asked."""

    tally: list[list[int]]
    """One row a block, one number a choice."""

    def note(self, block: int, counts: list[int]) -> None:
        """Add them."""
        self.tally[block] = [known + count for known, count in zip(self.tally[block], counts, strict=True)]

    def take(self) -> Tensor:
        """How many tokens took each choice since the last call, [2L, N] float64."""
        counts = pad_sequence([torch.tensor(row, dtype=torch.float64) for row in self.tally], batch_first=True)
        self.tally = [[0] * len(row) for row in self.tally]
        return counts


Selection = SubNetwork | Policy


class ActiveSelection:
    """Shared by all elastic modules of one backbone: they ask `width`, `use` answers.

    A plain attribute and not a context variable: backward on CUDA runs on another thread, and activation
    checkpointing recomputes the forward there. Whose selection it is, whole passes ask (`passes.py`), no block.

    Args:
        space: the choices.
        check: called before anything but the full network is active; raises what is wrong with the model.
    """

    def __init__(self, space: ElasticSpace, check: Callable[[], None]) -> None:
        self.space = space
        self.turns = Turns()
        self._check = check
        self._full = space.full()
        self.current: Selection = self._full
        # what was set, then that of every `use` inside; by name, because generators need not end in that order
        self._entered: dict[object, Selection] = {None: self.current}
        self._real: Tensor | None = None

    def width(self, block: int, hidden_states: Tensor) -> int | TokenGroups:
        """Units that a block uses for this input: one number, or a width for every token."""
        selection, widths = self.current, self.space.blocks[block].widths
        if isinstance(selection, SubNetwork):
            return widths[selection.choices[block]]
        groups, counts = group(widths, selection.choose(block, hidden_states), self._real)
        selection.note(block, counts)
        return groups

    def set(self, selection: Selection) -> None:
        """Make a selection active until another is set; `use` inside takes its turn and gives back.

        Waits for passes and generations of other threads.

        Raises:
            ValueError: if a sub-network belongs to another space.
            RuntimeError: if another thread is inside `use`, or this one in the middle of a generation.
        """
        with self.turns.turn("set", alone=True):
            if self.turns.mid_call:
                raise RuntimeError("this network is in the middle of a generation; set the next budget when it is over")
            self._look(selection)
            self._activate(next(reversed(self._entered)), selection)

    def begin(self, given: Mapping[str, Any]) -> None:
        """A pass begins: what is padding in it, a policy has to know; the blocks get masks that do not tell.

        Args:
            given: arguments of the model's forward, by name.
        """
        if isinstance(self.current, SubNetwork):
            return
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        tokens = (given["inputs_embeds"] if ids is None else ids).shape[1]
        self._real = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -tokens:].bool()
            self._real = None if real.all() else real
        self.current.begin(self._real)

    @contextmanager
    def use(self, selection: Selection) -> Iterator[None]:
        """Make a selection active; forward and backward of one pass both belong inside.

        Waits for passes and generations of other threads, and refuses them inside.

        Raises:
            ValueError: if a sub-network belongs to another space.
            RuntimeError: if another thread is inside `use`.
        """
        with self.turns.turn("open", alone=True), self._entering(selection):
            yield

    def recalled(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What is around a part of a pass, and around its recomputation in backward: there the same is active again.

        Raises:
            RuntimeError: in backward, if another thread has the network by then, with another selection.
        """
        return nullcontext(), self._again(self.current, self._real)

    @contextmanager
    def _again(self, then: Selection, real: Tensor | None) -> Iterator[None]:
        now = self.current, self._real
        # as it should be: backward within `use`, on whatever thread
        if now[0] == then:
            yield
            return
        with self.turns.turn("open", alone=True):
            self.current, self._real = then, real
            try:
                yield
            finally:
                self.current, self._real = now

    @contextmanager
    def call(self, selection: Selection | None = None) -> Iterator[None]:
        """As `use` for a call that ends by itself, which other threads wait for; None keeps to what is active."""
        with (
            self.turns.turn("call", alone=selection is not None),
            nullcontext() if selection is None else self._entering(selection),
        ):
            yield

    @contextmanager
    def _entering(self, selection: Selection) -> Iterator[None]:
        self._look(selection)
        name = object()
        self._activate(name, selection)
        try:
            yield
        finally:
            del self._entered[name]
            last = next(reversed(self._entered))
            self._activate(last, self._entered[last])

    def _look(self, selection: Selection) -> None:
        if isinstance(selection, SubNetwork):
            self.space.check(selection)
        if selection != self._full:
            self._check()

    def _activate(self, name: object, selection: Selection) -> None:
        self._entered[name] = selection
        self.current, self._real = selection, None
        # what a policy is told of a pass, and what it counts, is of one at a time
        self.turns.together = isinstance(selection, SubNetwork)
