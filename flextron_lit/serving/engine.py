"""One network, one thread that runs it, many requests: each budget's batch has its turn of a few tokens."""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from flextron_lit.model import FlextronModel
from flextron_lit.serving.asked import Sampling
from flextron_lit.serving.batch import Batch
from flextron_lit.serving.drawing import next_token
from flextron_lit.serving.refusal import RequestError
from flextron_lit.serving.telling import Teller
from flextron_lit.serving.waiting import Waiting
from flextron_lit.space import SubNetwork

TOKENS_A_TURN = 4
"""Every sequence of a batch goes on by so many before the next budget's batch has its turn."""
JOINING = 4
"""Most prompts that are read before those who run already go on."""
End = Literal["stop", "length", "failed"]


@dataclass(frozen=True)
class Piece:
    """What there is to tell a client."""

    text: str
    tokens: int
    """Of the answer so far."""
    end: End | None = None
    """Why it is the last piece, if it is."""


@dataclass(eq=False)
class Job:
    """One request on its way through the engine."""

    prompt: Sequence[int]
    sub_network: SubNetwork
    most: int
    """Tokens of the answer."""
    sampling: Sampling
    teller: Teller
    hear: Callable[[Piece], None]
    """Told every piece, from the engine's thread."""
    gone: bool = False
    """Whether nobody waits for the rest."""
    tokens: list[int] = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        if self.sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.sampling.seed)


class Engine:
    """Runs requests in a thread of its own.

    Args:
        model: the network.
        ends: tokens that end an answer.
        slots: most requests that run at once, over all budgets.
        places: most that wait.
    """

    def __init__(self, model: FlextronModel, ends: frozenset[int], *, slots: int, places: int) -> None:
        self._model, self._ends, self._slots, self._places = model, ends, slots, places
        self._changed = threading.Condition()
        self._waiting: Waiting[Job] = Waiting()
        self._lanes: dict[SubNetwork, _Lane] = {}
        self._open = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """End when all that is in the house is answered, and take nothing new."""
        with self._changed:
            self._open = False
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it takes requests."""
        return self._open and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests with one."""
        return sum(len(lane.jobs) for lane in list(self._lanes.values()))

    def submit(self, job: Job) -> None:
        """Have a job run as soon as there is a slot.

        Raises:
            RequestError: if too many wait already, or the server ends.
        """
        with self._changed:
            if not self.alive:
                raise RequestError(503, "the server is going down; ask again later")
            # who has come a moment ago has no slot yet, though there may be one
            if self.running + self.waiting >= self._slots + self._places:
                raise RequestError(429, f"{self._places} requests wait already; ask again later", code="queue_full")
            self._waiting.put(job.sub_network, job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Nobody waits for a job any more: its slot is free before the next token."""
        with self._changed:
            job.gone = True
            self._waiting.remove(job)
            self._changed.notify()

    # --- the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while self._open and not self._lanes and not self._waiting:
                    self._changed.wait()
                if not self._lanes and not self._waiting:
                    return
            for _ in range(JOINING):
                self._admit()
            for sub_network, lane in list(self._lanes.items()):
                self._guarded(lane, lane.go_on)
                if not lane.jobs:
                    del self._lanes[sub_network]

    def _admit(self) -> None:
        """Have the next that waits join the batch of its budget, if there is a slot."""
        running: Counter[Hashable] = Counter({sub: len(lane.jobs) for sub, lane in self._lanes.items()})
        with self._changed:
            job = self._waiting.take(running) if running.total() < self._slots else None
            if job is None:
                return
            lane = self._lanes.setdefault(job.sub_network, _Lane(self._model, job.sub_network, self._ends))
            lane.jobs.append(job)
        self._guarded(lane, lane.join)

    def _guarded(self, lane: "_Lane", action: Callable[[], None]) -> None:
        """What fails, such as memory that is not there, fails for the batch that it happens in alone."""
        try:
            with self._model.backbone.selection.call(lane.sub_network):
                action()
        except Exception as error:
            print(f"error: a batch of {len(lane.jobs)} failed: {error}", file=sys.stderr, flush=True)
            lane.fail()


class _Lane:
    """The batch of one budget, and whose rows are in it."""

    def __init__(self, model: FlextronModel, sub_network: SubNetwork, ends: frozenset[int]) -> None:
        self.sub_network = sub_network
        self.jobs: list[Job] = []
        self._batch, self._model, self._ends = Batch(model), model, ends

    def join(self) -> None:
        """Read the prompt of the last job; its first token may be its last."""
        job, others = self.jobs[-1], len(self.jobs) - 1
        logits = self._batch.join(job.prompt)
        self._keep([*range(others), *([others] if self._takes(job, logits) else [])])

    def go_on(self) -> None:
        """A turn: some tokens of every sequence."""
        for _ in range(TOKENS_A_TURN):
            self._keep([row for row, job in enumerate(self.jobs) if not job.gone])
            if not self.jobs:
                return
            logits = self._batch.step([job.tokens[-1] for job in self.jobs])
            self._keep([row for row, job in enumerate(self.jobs) if self._takes(job, logits[row])])

    def fail(self) -> None:
        """Tell all that there is no more to come."""
        for job in self.jobs:
            job.hear(Piece("", len(job.tokens), "failed"))
        self.jobs, self._batch = [], Batch(self._model)

    def _takes(self, job: Job, logits: Tensor) -> bool:
        """Draw a job's next token from its logits [V] and tell it; whether there is another to come."""
        token = next_token(logits, job.sampling, job.generator)
        job.tokens.append(token)
        end: End | None = "stop" if token in self._ends else "length" if len(job.tokens) == job.most else None
        text, stopped = job.teller.tell(job.tokens, last=end is not None)
        piece = Piece(text, len(job.tokens), "stop" if stopped else end)
        # whoever left in this moment hears nothing
        with suppress(RuntimeError):
            job.hear(piece)
        return piece.end is None

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self.jobs):
            self.jobs = [self.jobs[row] for row in rows]
            self._batch.keep(rows)
