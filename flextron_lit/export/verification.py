"""Whether what was written computes what the elastic network does."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flextron_lit.elastic.positions import readable

TOLERANCE = 1e-5
"""Largest difference of a logit, relative to the largest logit: two orders of summation in float32."""


@dataclass(frozen=True)
class Verified:
    """How a model that was read back compares with the elastic network."""

    difference: float
    """Largest difference of a logit, relative to the largest logit of the elastic network in float32."""
    agreement: float
    """Share of positions at which both predict the same token."""
    loss: float | None
    """Of the written model, in nats per token; None where there is no text."""
    elastic_loss: float | None
    """Of the sub-network in the elastic network, in float32, on the same text."""


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """What a model says to random tokens, [2, 32, V] float32; fewer where it has fewer positions."""
    # the same token ids every time
    shape = (2, min(32, readable(model.config)))
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    found: Tensor = model(ids.to(model.device), use_cache=False).logits
    return found.float()


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest magnitude expected; infinite where a number is not finite."""
    worst = float((found - expected.to(found.device)).abs().max() / expected.abs().max())
    return worst if worst == worst else float("inf")


def agreement(found: Tensor, expected: Tensor) -> float:
    """Share of positions whose most likely token is the same."""
    return float((found.argmax(-1) == expected.to(found.device).argmax(-1)).float().mean())


def demand_equal(found: Tensor, expected: Tensor) -> None:
    """Refuse a model that computes something else.

    Raises:
        ValueError: with how much it differs.
    """
    worst = difference(found, expected)
    if not worst <= TOLERANCE:
        raise ValueError(
            f"the written model does not compute what the elastic network does: logits differ by {worst:.1e} of the "
            f"largest, more than {TOLERANCE:.0e}; nothing was kept. Please report this with your command"
        )
