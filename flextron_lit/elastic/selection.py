"""The one place that knows which sub-network is active."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from flextron_lit.elastic.grouping import TokenGroups, group
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
    checkpointing recomputes the forward there.

    Args:
        space: the choices.
        model: whose passes a policy has to know of; it is hooked while one is active.
        check: called before anything but the full network is active; raises what is wrong with the model.
    """

    def __init__(self, space: ElasticSpace, model: nn.Module, check: Callable[[], None]) -> None:
        self.space = space
        self.model = model
        self._check = check
        self._full = space.full()
        self.current: Selection = self._full
        self._owner: int | None = None
        self._real: Tensor | None = None
        self._hook: RemovableHandle | None = None
        # looked up once: a decode step is short
        self._arguments = tuple(signature(type(model).forward).parameters)[1:]

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

        Raises:
            ValueError: if a sub-network belongs to another space.
        """
        if isinstance(selection, SubNetwork):
            self.space.check(selection)
        if selection != self._full:
            self._check()
        self.current, self._real = selection, None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if not isinstance(selection, SubNetwork):
            self._hook = self.model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, model: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        """A pass begins: what is padding in it, the policy has to know; the blocks get masks that do not tell."""
        assert not isinstance(self.current, SubNetwork)
        given = dict(zip(self._arguments, inputs, strict=False)) | options
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

        Raises:
            ValueError: if a sub-network belongs to another space.
            RuntimeError: if another thread is inside `use`.
        """
        thread = threading.get_ident()
        if self._owner not in (None, thread):
            raise RuntimeError(
                "another thread is using this elastic backbone with its own selection; "
                "give each thread a backbone of its own, or take turns"
            )
        previous, owner = self.current, self._owner
        self.set(selection)
        self._owner = thread
        try:
            yield
        finally:
            self.set(previous)
            self._owner = owner
