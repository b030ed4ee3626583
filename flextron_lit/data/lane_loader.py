"""A loader over lanes: shared out over ranks and workers, saved and restored where it stands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from flextron_lit.data.lanes import Lane
from flextron_lit.data.packing import Block
from flextron_lit.files.ranks import gather

State = dict[str, Any]
Item = tuple[Block, int, State] | str
"""A block, its lane, and where that lane stands behind it; or why there is none."""
MakeLane = Callable[[int, State | None], Lane]


class _Turns(IterableDataset[Item]):
    """Blocks of one rank's lanes in turn; of several workers each has every so manieth of these lanes."""

    def __init__(self, make_lane: MakeLane, own: list[int], states: Mapping[int, State]) -> None:
        self.make_lane, self.own, self.states = make_lane, own, states

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        # a DataLoader takes an item of each worker in turn, which are the turns of the lanes
        own = self.own if worker is None else self.own[worker.id :: worker.num_workers]
        try:
            for lane in cycle([self.make_lane(number, self.states.get(number)) for number in own]):
                yield lane.next_block(), lane.number, lane.state()
        except ValueError as error:
            if worker is None:
                raise
            # raised in a worker, it would arrive with a traceback in place of its message
            yield str(error)


class LaneLoader:
    """Batches of training text that has no end, which Lightning saves and restores behind the last one delivered.

    Block `g` of all is of lane `g % lanes`; batch by batch the ranks take so many each in turn. The state is the same
    on every rank and says where every lane stands, so that a run may go on with another number of ranks, workers or
    blocks a batch: blocks go on where they were.

    Args:
        make_lane: a lane by its number and state; can go to another process.
        lanes: how many there are.
        batch_size: blocks of a batch, on each rank.
        rank: which one this is.
        world: of how many.
        num_workers: processes that read and tokenise; 0 does so in this one.
        epoch_batches: batches after which Lightning is told that an epoch ends; the text goes on behind it.
        key: what says that a state is of this text.

    Raises:
        ValueError: as `demand_shares`.
    """

    def __init__(
        self,
        make_lane: MakeLane,
        *,
        lanes: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        epoch_batches: int,
        key: str = "",
    ) -> None:
        demand_shares(lanes, world, num_workers)
        self.make_lane, self.lanes, self.batch_size = make_lane, lanes, batch_size
        self.rank, self.world, self.num_workers = rank, world, num_workers
        self.epoch_batches, self.key = epoch_batches, key
        self.epoch = 0
        self._epoch, self._delivered, self._blocks = 0, 0, 0
        self._states: dict[int, State] = {}

    @property
    def sampler(self) -> LaneLoader:
        """Where Lightning looks for whom to tell the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is of."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.epoch_batches

    def __iter__(self) -> Iterator[Block]:
        if self._epoch != self.epoch:
            self._epoch, self._delivered = self.epoch, 0
        items = iter(self._items())
        for _ in range(self._delivered, len(self)):
            taken = list(islice(items, self.batch_size))
            blocks = []
            for item in taken:
                if isinstance(item, str):
                    raise ValueError(item)
                made, number, state = item
                blocks.append(made)
                self._states[number] = state
            self._blocks += self.batch_size * self.world
            self._delivered += 1
            yield default_collate(blocks)
        self._delivered = 0

    def _items(self) -> DataLoader[Item]:
        first = self._blocks + self.rank
        own = [(first + turn) % self.lanes for turn in range(0, self.lanes, self.world)]
        turns = _Turns(self.make_lane, own, dict(self._states))
        workers: dict[str, Any] = {"worker_init_fn": _alone} if self.num_workers else {}
        # with a generator of its own: an iterator draws from it, and must leave the global one alone
        own_generator = torch.Generator()
        return DataLoader(turns, batch_size=None, num_workers=self.num_workers, generator=own_generator, **workers)

    def state_dict(self) -> State:
        """Where every lane stands, and batches delivered of which epoch; to be called on all ranks."""
        found: dict[int, State] = {}
        for states in gather(self._states, self.world):
            for number, state in states.items():
                # behind a change of ranks several know a lane; who has it now is furthest
                if number not in found or found[number]["blocks"] < state["blocks"]:
                    found[number] = state
        delivered = self._delivered if self._epoch == self.epoch else 0
        return {"batches": delivered, "epoch": self.epoch, "blocks": self._blocks, "lanes": found, "text": self.key}

    def load_state_dict(self, state: State) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: if the state is of another text.
        """
        if state.get("text") != self.key:
            raise ValueError(
                "the text is not what it was when the run was interrupted (its files, their sizes, or how they are "
                "read): bring it back, or start anew with --fresh"
            )
        self._epoch, self._delivered, self._blocks = state["epoch"], state["batches"], state["blocks"]
        self.epoch, self._states = self._epoch, dict(state["lanes"])


def demand_shares(lanes: int, world: int, num_workers: int) -> None:
    """Refuse lanes that ranks and their workers cannot share.

    Raises:
        ValueError: with how many they could.
    """
    workers = max(1, num_workers)
    if lanes % (world * workers):
        fitting = -(-lanes // (world * workers)) * world * workers
        raise ValueError(
            f"{world} processes with {workers} workers each cannot share {lanes} lanes evenly; set "
            f"data.init_args.streaming.lanes to {fitting} before the run begins, or change data.init_args.num_workers"
        )


def _alone(_: int) -> None:
    """Workers are processes already: their tokenizers need no threads, and are told so before they warn."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
