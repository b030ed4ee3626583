"""Random hard choices with gradients: Gumbel-softmax, straight through (Jang et al. 2017; paper, router training)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Temperature:
    """Of the Gumbel-softmax over the run: falls from start to end by the same factor every step (ours).

    High: choices are explored, gradients reach them all. Low: the soft probabilities come close to the hard choice.
    """

    start: float = 4.0
    """At the first step."""
    end: float = 0.3
    """At the last step."""

    def __post_init__(self) -> None:
        if min(self.start, self.end) <= 0:
            raise ValueError(f"a temperature must be above 0, not {self.start} to {self.end}")

    def at(self, progress: float) -> float:
        """The temperature at a share of the run, 0 to 1."""
        return self.start * (self.end / self.start) ** min(max(progress, 0.0), 1.0)


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, float32; the arg-max of logits plus noise is a draw from their softmax."""
    # exponential draws are never 0 for this generator's resolution but once in 2^24: the clamp keeps that one finite
    return -torch.empty(shape).exponential_(generator=generator).clamp(min=1e-20).log()


def straight_through(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """One-hot choices whose gradients are those of the soft ones.

    Args:
        logits: [..., N]; -inf where a block has no such choice.
        noise: [..., N].
        temperature: of the softmax.

    Returns:
        [..., N], exactly one-hot in value.
    """
    soft = ((logits + noise) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    # in this order the value is exact: (hard - soft) + soft is not always 1
    return hard + (soft - soft.detach())


def entropy(logits: Tensor) -> Tensor:
    """Mean over blocks of the entropy of the choices, relative to the largest possible one: 0 decided, 1 uniform.

    Args:
        logits: [..., 2L, N]; -inf where a block has no such choice. Blocks with a single choice do not count.

    Returns:
        [...].
    """
    probabilities = logits.softmax(-1)
    exists = logits.isfinite()
    each = -(probabilities * logits.log_softmax(-1).masked_fill(~exists, 0.0)).sum(-1)
    largest = exists.sum(-1).log()
    return each.sum(-1) / largest.sum(-1).clamp(min=1e-9)
