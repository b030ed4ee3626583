"""Surrogates that tell a dynamic router how well it chose, and go on learning from what its choices lost."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flextron_lit.files.ranks import gather
from flextron_lit.losses.by_chunk import token_cross_entropy
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.routers.dynamic import RoutedPass
from flextron_lit.routers.pairs import Memory
from flextron_lit.routers.surrogate import Surrogate, Target, encode
from flextron_lit.stages.base import Stage
from flextron_lit.stages.router_training import functional


@dataclass(frozen=True)
class Observed:
    """What the full network and a router's choices lost in a step, at positions that predict a token and others."""

    losses: Tensor
    """Of the choices, in nats: [B, T - 1]."""
    full: Tensor
    """Of the full network, in nats: [B, T - 1]."""
    counted: Tensor
    """Positions that predict a token, bool [B, T - 1]."""
    states: Tensor
    """Last hidden states of the full network, [B, T - 1, D]."""


class SurrogateGuide(ABC):
    """A surrogate with the rows that it learns from: the last ones that were seen.

    Args:
        surrogate: predicts targets from `inputs`; its buffer `scale` is their standard deviation.
        capacity: rows.
    """

    seen: Observed
    """What the last step met: choices of later passes on the same text are judged by it too."""

    def __init__(self, surrogate: nn.Module, capacity: int) -> None:
        self.surrogate = surrogate
        self.memory = Memory(capacity)
        self.fresh: list[tuple[float, float]] = []
        """Predicted and observed targets of the last step, before the surrogate learned from them."""

    @abstractmethod
    def inputs(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """What the surrogate reads of a step's choices [B, T, 2L, N], a row a target."""

    @abstractmethod
    def targets(self) -> Tensor:
        """What the surrogate should have predicted for the step that was seen."""

    @property
    def scale(self) -> Tensor:
        """Standard deviation of the targets."""
        scale = self.surrogate.scale
        assert isinstance(scale, Tensor)
        return scale

    def predicted(self, routed: RoutedPass) -> Tensor:
        """Mean loss that the surrogate predicts for what the router chose, in standard deviations of its targets."""
        return functional(self.surrogate, *self.inputs(routed.chosen)).mean() / self.scale

    def see(self, seen: Observed, chosen: Tensor, world_size: int) -> None:
        """Remember a step's choices [B, T, 2L, N] and losses, those of all ranks: so every rank learns the same."""
        self.seen = seen
        inputs, targets = self.inputs(chosen), over_ranks(self.targets(), world_size)
        if not self.memory.columns:
            self.begin(targets)
        with torch.no_grad():
            known = over_ranks(self.surrogate(*inputs), world_size)
        rows = {f"input{i}": over_ranks(value, world_size) for i, value in enumerate(inputs)}
        self.memory.add({**rows, "target": targets})
        self.fresh = list(zip(known.tolist(), targets.tolist(), strict=True))

    def begin(self, targets: Tensor) -> None:
        """The first targets are there."""
        return

    def error(self, count: int, generator: torch.Generator) -> Tensor:
        """Mean squared error of the surrogate over the variance of its targets, on random rows of the memory."""
        rows = self.memory.sample(count, generator)
        inputs = [rows[name] for name in sorted(rows) if name.startswith("input")]
        return ((self.surrogate(*inputs) - rows["target"]) / self.scale).square().mean()


class TokenGuide(SurrogateGuide):
    """Predicts the excess loss of every token from its own choices and its hidden state (ours)."""

    def inputs(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """Choices and states of the predicted tokens."""
        return chosen[:, :-1][self.seen.counted], self.seen.states[self.seen.counted]

    def targets(self) -> Tensor:
        """Excess loss of every predicted token in nats."""
        return (self.seen.losses - self.seen.full)[self.seen.counted]

    def begin(self, targets: Tensor) -> None:
        """Take their scale: the surrogate is made from nothing."""
        self.scale.copy_(targets.std().clamp(min=1e-6))


class SequenceGuide(SurrogateGuide):
    """Predicts the target of a static router's surrogate from the mean choices of a sequence (paper)."""

    def __init__(self, surrogate: Surrogate, capacity: int, target: Target) -> None:
        super().__init__(surrogate, capacity)
        self.target = target

    def inputs(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """Mean choices over the predicted tokens of each sequence, [B, 2L, N]."""
        counted = self.seen.counted
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        return ((weights[..., None, None] * chosen[:, :-1]).sum(1),)

    def targets(self) -> Tensor:
        """Of the mean loss of each sequence, [B]."""
        tokens = self.seen.counted.sum(1).clamp(min=1)
        ours, theirs = self.seen.losses.sum(1) / tokens, self.seen.full.sum(1) / tokens
        return ours if self.target == "loss" else encode(self.target, ours - theirs, 0.0)


def over_ranks(rows: Tensor, world_size: int) -> Tensor:
    """Rows of all ranks."""
    if world_size == 1:
        return rows
    return torch.cat(gather(rows.cpu(), world_size)).to(rows.device)


@torch.no_grad()
def run_both(stage: Stage, routed: RoutedPass, batch: Batch) -> Observed:
    """Forward passes of the full network, and of what the router chooses as it runs."""
    with stage.backbone.use(stage.backbone.space.full()):
        predictions = stage.predictions(batch)
        full, counted = token_cross_entropy(predictions, batch["labels"])
    with stage.backbone.use(routed):
        losses, _ = token_cross_entropy(stage.predictions(batch), batch["labels"])
    return Observed(losses, full, counted, predictions.hidden[:, :-1].float())
