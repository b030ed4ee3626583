"""Lanes: a fixed number of streams side by side, in which a text of any size is read, shuffled and packed (ours).

How many there are does not depend on ranks and workers, which share them out. So the order of blocks is the same on any
number of both, and where every lane stands says all there is to know to go on, also on another number. MosaicML's
streaming has the same thought (canonical nodes), for samples that were counted and written beforehand.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np

from flextron_lit.data.corpus import Corpus
from flextron_lit.data.document import Document, content_of
from flextron_lit.data.encoding import Encoded
from flextron_lit.data.loader import permutation
from flextron_lit.data.packing import Block, block
from flextron_lit.data.streams import Split, TokenStream

WINDOW_CHARACTERS = 2**20
"""A window of long documents ends early."""
AT_ONCE = 16
"""Documents tokenised at once."""
EMPTY_ROUNDS = 16
"""A lane that gets no document in so many rounds will get none."""
GOLDEN = (math.sqrt(5) - 1) / 2


def split_of(document: Document, held_out: float, seed: int) -> Split:
    """On which side a document lies is said by its content alone: copies of one lie on the same, wherever they are.

    Args:
        document: as it is read.
        held_out: share that is held out, half of it for validation and half for test.
        seed: another one holds out others.
    """
    salt = seed.to_bytes(16, "little", signed=True)
    digest = hashlib.blake2b(content_of(document), digest_size=8, salt=salt).digest()
    place = int.from_bytes(digest, "little") / 2**64
    return "train" if place >= held_out else "validation" if place < held_out / 2 else "test"


@dataclass(frozen=True)
class Position:
    """How far a lane has read a domain: what it takes to go on from there."""

    round: int = 0
    """How often it has read all that it was dealt."""
    part: int = 0
    """Where the window begins: in which part,"""
    document: int = 0
    """and with which of its documents."""
    shown: int = 0
    """Documents of the window that were given whole."""
    token: int = 0
    """Tokens of the next that were given."""

    def to_json(self) -> list[int]:
        """Its numbers."""
        return [self.round, self.part, self.document, self.shown, self.token]


@dataclass(frozen=True)
class Reading:
    """What all readers of a domain have in common."""

    corpus: Corpus
    name: str
    lanes: int
    window: int
    held_out: float
    seed: int
    encode: Callable[[Sequence[Document]], list[Encoded]]


class Reader:
    """The documents of a domain that one lane gets, tokenised, shuffled in a window, round after round.

    In every round the parts of the corpus are dealt anew, and each of its documents is in one lane's round, once.

    Args:
        reading: of what, and how.
        lane: which one.
        split: documents of this one alone.
        position: where to go on.
        once: end behind the first round.
    """

    def __init__(self, reading: Reading, lane: int, split: Split, position: Position, *, once: bool = False) -> None:
        self.reading = reading
        self.lane = lane
        self.split = split
        self.position = position
        self.once = once
        self._source = self._documents()
        self._window: deque[Document] = deque()
        self._encoded: deque[Encoded] = deque()
        self._next = (position.round, position.part, position.document)
        self._begun = False

    def excerpt(self, most: int) -> tuple[int, Encoded] | None:
        """The next tokens of a document, at most so many, and where in it they begin; None at the end.

        Raises:
            ValueError: if a part cannot be read, or the lane gets no document.
        """
        if not self._encoded:
            while not self._window:
                if self._begun:
                    self.position = Position(*self._next)
                self._begun = True
                if not self._fill():
                    return None
            batch = [self._window.popleft() for _ in range(min(AT_ONCE, len(self._window)))]
            self._encoded.extend(self.reading.encode(batch))
        first, whole = self.position.token, self._encoded[0]
        ids = whole.ids[first : first + most]
        predicted = None if whole.predicted is None else whole.predicted[first : first + most]
        if first + len(ids) == len(whole.ids):
            self._encoded.popleft()
            self.position = replace(self.position, shown=self.position.shown + 1, token=0)
        else:
            self.position = replace(self.position, token=first + len(ids))
        return first, Encoded(ids, predicted)

    def _fill(self) -> bool:
        """Read the window that begins at the position, and leave out what of it was given; false at the end."""
        window: list[Document] = []
        characters = 0
        start = self._next
        while len(window) < self.reading.window and characters < WINDOW_CHARACTERS:
            found = next(self._source, None)
            if found is None:
                break
            self._next, document = found
            if document is None:
                # the round ends, and no window goes on behind it
                if window:
                    break
                continue
            window.append(document)
            characters += len(document)
        order = permutation(len(window), f"{self.reading.seed}/{self.reading.name}/{self.lane}/window/{start}")
        self._window.extend(window[index] for index in order[self.position.shown :])
        return bool(window)

    def _documents(self) -> Iterator[tuple[tuple[int, int, int], Document | None]]:
        """Documents from the position on, each with where it goes on behind it; None at the end of a round."""
        at, domain = self.position, self.reading.corpus.domain
        round_, first_part, first_document = at.round, at.part, at.document
        empty = 0
        while True:
            parts = self.reading.corpus.dealt(self.reading.lanes, f"{self.reading.seed}/{self.reading.name}/{round_}")
            seen = first_part + first_document > 0
            for index, part in enumerate(parts[self.lane][first_part:], first_part):
                start = first_document if index == first_part else 0
                for number, document in part.documents(domain, start):
                    if split_of(document, self.reading.held_out, self.reading.seed) == self.split:
                        seen = True
                        yield (round_, index, number + 1), document
            if self.once:
                return
            empty = 0 if seen else empty + 1
            if empty == EMPTY_ROUNDS:
                raise ValueError(
                    f"lane {self.lane} of {self.reading.lanes} gets no {self.split} document of domain "
                    f"{self.reading.name}, which has too few of them; lower streaming.lanes, or leave streaming out"
                )
            round_, first_part, first_document = round_ + 1, 0, 0
            yield (round_, 0, 0), None


class Lane:
    """Blocks of training text, one after the other, of several domains by their weights.

    Args:
        readers: one a domain.
        weights: of the domains.
        number: which lane it is.
        lanes: of how many.
        block_size: tokens of a block.
        separate: keep the documents of a block apart.
        blocks: how many it has given before.
    """

    def __init__(
        self,
        readers: Sequence[Reader],
        weights: Sequence[float],
        *,
        number: int,
        lanes: int,
        block_size: int,
        separate: bool,
        blocks: int = 0,
    ) -> None:
        self.readers = list(readers)
        self.number, self.lanes = number, lanes
        self.block_size, self.separate = block_size, separate
        self.blocks = blocks
        self._shares = [value / sum(weights) for value in accumulate(weights)]

    def next_block(self) -> Block:
        """The next block, as `packing.block` makes them.

        Raises:
            ValueError: as `Reader.excerpt`.
        """
        index = self.blocks * self.lanes + self.number
        # multiples of the golden ratio fall evenly into the shares, in every stretch of blocks and without a memory
        place = (index + 1) * GOLDEN % 1
        reader = self.readers[next((i for i, end in enumerate(self._shares) if place < end), len(self.readers) - 1)]
        self.blocks += 1
        return block(stream_of(reader, self.block_size), 0, self.block_size, separate=self.separate)

    def state(self) -> dict[str, Any]:
        """Where it stands, JSON-able."""
        return {"blocks": self.blocks, "positions": [reader.position.to_json() for reader in self.readers]}


def stream_of(reader: Reader, tokens: int) -> TokenStream:
    """The next tokens of a reader that has no end.

    Raises:
        ValueError: as `Reader.excerpt`.
    """
    found: list[Encoded] = []
    left = tokens
    while left:
        excerpt = reader.excerpt(left)
        assert excerpt is not None, "training text has no end"
        found.append(excerpt[1])
        left -= len(excerpt[1].ids)
    return joined(found)


def joined(excerpts: Sequence[Encoded]) -> TokenStream:
    """Excerpts one after the other, each as a document."""
    lengths = [len(each.ids) for each in excerpts]
    masks = [each.predicted for each in excerpts if each.predicted is not None]
    return TokenStream(
        np.concatenate([np.asarray(each.ids, dtype=np.int64) for each in excerpts]),
        np.cumsum([0, *lengths[:-1]]),
        np.concatenate([np.asarray(mask, dtype=np.bool_) for mask in masks]) if masks else None,
    )


def first_documents(readings: Reading, split: Split, tokens: int) -> TokenStream:
    """The first documents of a domain, one of each lane in turn, until there are so many tokens or no more.

    Every lane reads its own parts from their beginning, so they are from all over the corpus, and little is read.

    Args:
        readings: of the domain.
        split: which documents.
        tokens: how many at least, if there are.

    Raises:
        ValueError: if a part cannot be read, or there is no such document.
    """
    one = replace(readings, window=1)
    live = [Reader(one, lane, split, Position(), once=True) for lane in range(one.lanes)]
    found: list[Encoded] = []
    left = tokens
    while live and left > 0:
        for reader in list(live):
            excerpt = reader.excerpt(2**62) if left > 0 else None
            if excerpt is None:
                live.remove(reader)
                continue
            found.append(excerpt[1])
            left -= len(excerpt[1].ids)
    if not found:
        raise ValueError(
            f"domain {readings.name} has no {split} document: of each its content says on which side it lies; add "
            "text, or change held_out or seed"
        )
    return joined(found)


def restored(state: Mapping[str, Any] | None, domains: int) -> tuple[int, list[Position]]:
    """Blocks that a lane has given, and where it stands in every domain; inverse of `Lane.state`."""
    if state is None:
        return 0, [Position()] * domains
    return state["blocks"], [Position(*numbers) for numbers in state["positions"]]
