"""Which blocks come when: an order that depends on seed and epoch alone, and a loader that resumes within it."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from flextron_lit.data.packing import Block, block
from flextron_lit.data.streams import TokenStream


class BlockDataset(Dataset[Block]):
    """All blocks of several streams, one stream after the other."""

    def __init__(self, streams: Sequence[TokenStream], block_size: int, *, separate: bool = True) -> None:
        self.streams = streams
        self.block_size = block_size
        self.separate = separate
        # whole blocks; the rest is left out
        self.sizes = [len(stream.tokens) // block_size for stream in streams]

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Block:
        for stream, size in zip(self.streams, self.sizes, strict=True):
            if index < size:
                return block(stream, index, self.block_size, separate=self.separate)
            index -= size
        raise IndexError(f"block {index} is past the last one of {len(self)}")


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Split a whole number in proportion to weights, by largest remainder; the parts add up to it."""
    exact = [total * weight / sum(weights) for weight in weights]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def evenly(size: int, count: int) -> list[int]:
    """Positions of `count` of `size` blocks, equally far apart."""
    return [i * size // count for i in range(count)]


def mixed_order(sizes: Sequence[int], weights: Sequence[float], *, epoch: int, seed: int) -> list[int]:
    """Block indices of one epoch, mixed over domains by weight.

    An epoch has as many blocks as the domains have together. Each domain runs through permutations of its own that go
    on from epoch to epoch, so a small one repeats and a large one is not seen twice before it was seen whole.

    Args:
        sizes: blocks of each domain.
        weights: of each domain.
        epoch: counts from 0.
        seed: of all permutations.
    """
    assert all(sizes), "a domain without a block cannot be mixed in"
    wanted = shares(sum(sizes), weights)
    chosen: list[int] = []
    offset = 0
    for domain, (size, count) in enumerate(zip(sizes, wanted, strict=True)):
        positions = range(epoch * count, (epoch + 1) * count)
        cycles = range(positions.start // size, -(-positions.stop // size)) if count else range(0)
        permutations = {cycle: permutation(size, f"{seed}/{domain}/{cycle}") for cycle in cycles}
        chosen += [offset + permutations[p // size][p % size] for p in positions]
        offset += size
    shuffled = permutation(len(chosen), f"{seed}/epoch/{epoch}")
    return [chosen[i] for i in shuffled]


def permutation(size: int, name: str) -> list[int]:
    """An order of so many, the same wherever it is asked for by that name."""
    # Python's own hash of a text differs between processes; the largest prime below 2**63 keeps every character in play
    generator = torch.Generator().manual_seed(int.from_bytes(name.encode(), "little") % (2**63 - 25))
    return torch.randperm(size, generator=generator).tolist()


class EpochSampler(Sampler[int]):
    """One rank's share of each epoch's order; Lightning sets the epoch."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], *, seed: int, rank: int, world: int) -> None:
        self.sizes, self.weights = list(sizes), list(weights)
        self.seed, self.rank, self.world = seed, rank, world
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.sizes) // self.world

    def __iter__(self) -> Iterator[int]:
        order = mixed_order(self.sizes, self.weights, epoch=self.epoch, seed=self.seed)
        own = order[self.rank : len(self) * self.world : self.world]
        start, self.start = self.start, 0
        return iter(own[start:])


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that Lightning saves and restores: it goes on at the batch after the last one delivered.

    What was delivered counts for its epoch only, so an epoch that is left early (`limit_train_batches`) does not move
    the next one's start. The state is the same on every rank. The loader has a generator of its own, since each epoch's
    iterator draws from it, and a checkpoint at the end of an epoch would otherwise resume with other global random
    numbers.
    """

    sampler: EpochSampler

    def __init__(self, dataset: Dataset[Any], *, sampler: EpochSampler, batch_size: int, num_workers: int) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            drop_last=True,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )
        self._delivered = 0
        self._epoch = sampler.epoch

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # a generator is all that Lightning asks for
        assert self.batch_size is not None
        if self._epoch != self.sampler.epoch:
            self._epoch, self._delivered = self.sampler.epoch, 0
        self.sampler.start = self._delivered * self.batch_size
        for batch in super().__iter__():
            self._delivered += 1
            yield batch
        self._delivered = 0

    def state_dict(self) -> dict[str, int]:
        """Batches delivered of which epoch."""
        delivered = self._delivered if self._epoch == self.sampler.epoch else 0
        return {"batches": delivered, "epoch": self.sampler.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Inverse of `state_dict`."""
        self._delivered, self._epoch = state["batches"], state["epoch"]
        self.sampler.epoch = self._epoch


class Turns(Dataset[Any]):
    """One rank's share of some blocks, in batches; None in the place of those that others have more.

    Ranks wait for each other, at the end of a loader or at every layer, so all take as many turns.

    Args:
        dataset: of blocks.
        chosen: indices of all ranks' blocks.
        batch_size: blocks of a batch.
        rank: whose share.
        world: how many ranks there are.
    """

    def __init__(self, dataset: Dataset[Block], chosen: Sequence[int], batch_size: int, rank: int, world: int) -> None:
        self.dataset = dataset
        own, longest = chosen[rank::world], -(-len(chosen) // world)
        self.batches = [own[turn : turn + batch_size] for turn in range(0, longest, batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, turn: int) -> Block | None:
        blocks = [self.dataset[index] for index in self.batches[turn]]
        return default_collate(blocks) if blocks else None

    def loader(self) -> DataLoader[Any]:
        """For Lightning."""
        return DataLoader(self, collate_fn=_only)


def _only(batches: list[Any]) -> Any:
    return batches[0]


def in_order(loader: DataLoader[Any]) -> Iterator[Any]:
    """The batches of a loader of `Turns`, without the global random number that its iterator draws."""
    turns: Any = loader.dataset
    return (batch for batch in map(turns.__getitem__, range(len(turns))) if batch is not None)


def batched(blocks: Iterable[Block], size: int) -> Iterator[Block]:
    """Blocks in batches of at most so many."""
    remaining = iter(blocks)
    while batch := list(islice(remaining, size)):
        yield default_collate(batch)
