"""Losses document by document, so that what they say can be resampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.selection import Selection
from flextron_lit.losses.by_chunk import Predictions, token_cross_entropy
from flextron_lit.losses.measured_loss import INPUTS
from flextron_lit.terminal.progress import progress

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """Summed losses in nats, and predicted tokens, of n documents: [n] each, float64."""

    total: Tensor
    tokens: Tensor

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.total.sum() / self.tokens.sum())

    def __add__(self, other: Losses) -> Losses:
        """The documents of both."""
        return Losses(torch.cat([self.total, other.total]), torch.cat([self.tokens, other.tokens]))

    def __sub__(self, other: Losses) -> Losses:
        """What the same documents lose more than another network says."""
        assert torch.equal(self.tokens, other.tokens), "differences are of the same documents"
        return Losses(self.total - other.total, self.tokens)


def pooled(losses: Sequence[Losses]) -> Losses:
    """The documents of several texts."""
    return sum(losses[1:], losses[0])


def documents(batch: Batch) -> Tensor:
    """Which piece of its block each predicting token belongs to: [B, T - 1].

    A document begins where positions restart; a block without positions is one.
    """
    positions = batch.get("position_ids")
    if positions is None:
        return torch.zeros_like(batch["labels"][:, 1:])
    return (positions == 0).cumsum(1)[:, :-1]


@torch.no_grad()
def document_losses(
    backbone: ElasticBackbone,
    selection: Selection,
    batches: Sequence[Batch],
    name: str,
    *,
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Losses:
    """Losses of all documents; one that blocks cut apart counts once a block, one that predicts nothing not at all.

    Args:
        backbone: the elastic network; put it on its device and in its mode first.
        selection: what is active.
        batches: `input_ids`, `labels` and, for packed documents, `position_ids`: [B, T].
        name: shown while it takes its time.
        forward_context: around the forward passes, for example an autocast.
    """
    totals, counts = [], []
    with backbone.use(selection), forward_context():
        for batch in progress(batches, name):
            here = {key: tensor.to(backbone.model.device) for key, tensor in batch.items()}
            inputs = {key: here[key] for key in INPUTS if key in here}
            found = token_cross_entropy(Predictions.of(backbone.model, inputs), here["labels"])
            losses, predicted = (each.cpu() for each in found)
            for row, counted, document in zip(losses, predicted, documents(batch).cpu(), strict=True):
                size = int(document.max()) + 1
                totals.append(torch.zeros(size).index_add(0, document, row))
                counts.append(torch.zeros(size).index_add(0, document, counted.float()))
    total, tokens = torch.cat(totals), torch.cat(counts)
    return Losses(total[tokens > 0].double(), tokens[tokens > 0].double())
