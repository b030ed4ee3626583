"""The losses of `cross_entropy.py` without all logits at once, neither forward nor backward (ours).

For a large vocabulary the logits of a batch are the largest tensors of a step, [tokens, V] in float32, several times.
Here they stand for some tokens at a time: in backward those of each chunk are computed again, which costs the head's
product once more. Teachers are kept as hidden states likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from flextron_lit.elastic.sharding import is_shared_out
from flextron_lit.losses import cross_entropy as whole
from flextron_lit.losses.cross_entropy import IGNORED

CHUNK_NUMBERS = 2**25
"""Logits that stand at once: 128 MiB in float32."""


@dataclass(frozen=True)
class Head:
    """From hidden states to logits, as the model's own forward does it."""

    module: nn.Module
    cap: float | None = None
    """Logits are `cap * tanh(logits / cap)` (Gemma 2)."""
    scale: float = 1.0
    """Logits are multiplied by this (Granite's `1 / logits_scaling`, Cohere's `logit_scale`)."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Head:
        """A model's."""
        config: Any = model.config
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        return cls(model.get_output_embeddings(), getattr(config, "final_logit_softcapping", None), scale)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        logits: Tensor = self.module(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


@dataclass(frozen=True)
class Predictions:
    """What a pass predicts: hidden states, and the head that makes logits of them when they are wanted."""

    hidden: Tensor
    """[B, T, D], of the last layer, normalised."""
    head: Head
    chunk: int
    """Tokens whose logits stand at once."""
    known: Tensor | None = None
    """Logits [B, T, V] of the model's own forward, where all of a batch stand at once."""

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: Mapping[str, Tensor], chunk: int | None = None) -> Predictions:
        """Run a model.

        Args:
            model: a causal LM.
            inputs: of its forward.
            chunk: as in `chunk_of`.
        """
        kept: list[Any] = []
        tokens = inputs["input_ids"].numel()
        at_once = chunk_of(chunk, model.config.vocab_size, tokens)
        # a head that is shared out over processes is whole inside the model's forward alone
        shared_out = is_shared_out(next(iter(model.get_output_embeddings().parameters())))
        every = tokens <= at_once or shared_out
        # through the model's own forward, and not through that of its layers alone: wrappers go by it
        hook = model.base_model.register_forward_hook(lambda _, __, result: kept.append(result[0]))
        try:
            logits = model(**inputs, use_cache=False, logits_to_keep=0 if every else 1).logits
        finally:
            hook.remove()
        return cls(kept[0], Head.of(model), at_once, logits if every else None)

    @property
    def logits(self) -> Tensor:
        """[B, T, V], all at once."""
        return self.head(self.hidden) if self.known is None else self.known

    def detach(self) -> Predictions:
        """The same to learn from."""
        return replace(self, hidden=self.hidden.detach(), known=None if self.known is None else self.known.detach())

    @property
    def at_once(self) -> bool:
        """Whether all logits stand at once."""
        return self.known is not None


def chunk_of(chunk: int | None, vocab_size: int, tokens: int) -> int:
    """Tokens whose logits stand at once.

    Args:
        chunk: how many; 0 means all; None as many as have `CHUNK_NUMBERS` logits.
        vocab_size: logits of a token.
        tokens: of a batch.
    """
    if chunk is None:
        return max(1, CHUNK_NUMBERS // vocab_size)
    return chunk or tokens


def losses(
    predictions: Predictions, labels: Tensor, teachers: Mapping[str, Predictions], temperature: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Language loss and distillation losses, as `mean_cross_entropy` and `distillation` compute them.

    Args:
        predictions: of a pass.
        labels: [B, T]; -100 at a token that is not to be predicted.
        teachers: by name; no gradient flows to them.
        temperature: of the distillation.
    """
    if predictions.at_once:
        logits = predictions.logits
        own = whole.mean_cross_entropy(logits, labels)
        found = {n: whole.distillation(logits, t.logits, labels, temperature) for n, t in teachers.items()}
        return own, found
    heads = [each.head for each in teachers.values()]

    def parts(hidden: Tensor, targets: Tensor, *given: Tensor) -> Tensor:
        logits = predictions.head(hidden).float()
        sums = [F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")]
        predicted = (logits / temperature).log_softmax(-1) if heads else logits
        for head, states in zip(heads, given, strict=True):
            with torch.no_grad():
                wanted = (head(states).float() / temperature).log_softmax(-1)
            divergence = F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)
            sums.append((divergence * (targets != IGNORED)).sum())
        return torch.stack(sums)

    states = [predictions.hidden, *(each.hidden.detach() for each in teachers.values())]
    sums = torch.stack(_by_chunk(parts, states, labels, predictions.chunk)).sum(0)
    means = sums / (labels[:, 1:] != IGNORED).sum().clamp(min=1)
    return means[0], {name: temperature**2 * mean for name, mean in zip(teachers, means[1:], strict=True)}


def mean_cross_entropy(predictions: Predictions, labels: Tensor) -> Tensor:
    """Language loss in nats per predicted token; 0 where nothing is predicted."""
    return losses(predictions, labels, {})[0]


def token_cross_entropy(predictions: Predictions, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Language loss of every position in nats, [B, T - 1], and which of them predict a token; the others have 0."""
    if predictions.at_once:
        return whole.token_cross_entropy(predictions.logits, labels)

    def each(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(predictions.head(hidden).float(), targets, ignore_index=IGNORED, reduction="none")

    found = _by_chunk(each, [predictions.hidden], labels, predictions.chunk)
    return torch.cat(found).view(labels[:, 1:].shape), labels[:, 1:] != IGNORED


def cross_entropy(predictions: Predictions, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed language loss in nats, and the number of tokens predicted."""
    if predictions.at_once:
        return whole.cross_entropy(predictions.logits, labels)
    found, predicted = token_cross_entropy(predictions, labels)
    return found.sum(), predicted.sum()


def _by_chunk(function: Callable[..., Tensor], states: Sequence[Tensor], labels: Tensor, chunk: int) -> list[Tensor]:
    """A function of hidden states [n, D], of targets [n] and of more hidden states, over all predictions of a batch."""
    hidden, *others = (each[:, :-1].flatten(0, 1).split(chunk) for each in states)
    targets = labels[:, 1:].flatten().split(chunk)
    return [_again(function, h, t, *more) for h, t, *more in zip(hidden, targets, *others, strict=True)]


def _again(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """A function that computes again in backward, so that nothing within it is kept."""
    if not torch.is_grad_enabled():
        return function(*tensors)
    found: Tensor = checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)
    return found
