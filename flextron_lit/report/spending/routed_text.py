"""What a dynamic router gave to every token of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from flextron_lit.costs.table import CostTable
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.selection import Policy, Selection
from flextron_lit.losses.cross_entropy import token_cross_entropy
from flextron_lit.losses.measured_loss import INPUTS
from flextron_lit.report.spending.token_classes import TokenClass, token_classes
from flextron_lit.report.spending.token_pieces import Piece, pieces_of
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.space import KINDS, ElasticSpace, width_ratios

Batch = Mapping[str, Tensor]


class Recording(Policy):
    """A policy that chooses as another does, and keeps what was chosen in the last pass.

    Args:
        policy: what chooses. It is not told the counts: what it adds up is of passes without a recording.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._choices: dict[int, Tensor] = {}

    def begin(self, real: Tensor | None) -> None:
        """Forget the pass before."""
        self._choices = {}
        self.policy.begin(real)

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """Choice index of every token, [B, T]."""
        self._choices[block] = self.policy.choose(block, hidden_states)
        return self._choices[block]

    @property
    def choices(self) -> Tensor:
        """Of the last pass, int64 [B, T, 2L]."""
        return torch.stack([self._choices[block] for block in sorted(self._choices)], -1)


@dataclass(frozen=True)
class RoutedText:
    """Stretches of text, and what every token of them got; all tensors are [tokens], one stretch after the other.

    What a token gets serves the prediction of the token that follows: so losses are of that one.
    """

    pieces: list[Piece]
    classes: list[TokenClass]
    """One a token."""
    begins: Tensor
    """Whether a document begins with the token, bool."""
    cost: Tensor
    """As a ratio of the full network's."""
    mlp_width: Tensor
    """Mean share of the full width over the layers."""
    attention_width: Tensor
    """The same of KV groups."""
    loss: Tensor
    """Of predicting the token that follows, in nats; nan where none is predicted."""
    full_loss: Tensor
    """The full network's."""

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def values(self) -> dict[str, Tensor]:
        """What tokens are compared by."""
        return {name: getattr(self, name) for name in VALUES}

    def means(self, piece: Piece) -> dict[str, float]:
        """Of `VALUES` over the tokens of a piece; nan where none of them has one."""
        return means_of(self.values, slice(piece.start, piece.stop))

    def excerpt(self, tokens: int) -> RoutedText:
        """About so many tokens, from the first beginning of a document that has as many behind it in its stretch.

        From the first token, if there is none; all of the text, if it has no more.
        """
        cuts = [piece.start for piece in self.pieces if piece.cut]
        stretches = zip(cuts, [*cuts[1:], len(self)], strict=True)
        begins = (
            start + int(index)
            for start, stop in stretches
            for index in self.begins[start : max(start, stop - tokens + 1)].nonzero()
        )
        first = next(begins, 0)
        chosen = [piece for piece in self.pieces if piece.stop > first and piece.start < first + tokens]
        start, stop = chosen[0].start, chosen[-1].stop
        moved = [piece.moved(-start) for piece in chosen]
        moved[0] = replace(moved[0], cut=True)
        tensors = {name: value[start:stop] for name, value in self.values.items()}
        return RoutedText(moved, self.classes[start:stop], self.begins[start:stop], **tensors)


VALUES = ("cost", "mlp_width", "attention_width", "loss", "full_loss")
"""Tensors of a `RoutedText` by name."""


def means_of(values: Mapping[str, Tensor], tokens: slice | Tensor) -> dict[str, float]:
    """Means over some of the tokens, by name; nan where none of them has a value."""
    return {name: float(value[tokens].nanmean()) for name, value in values.items()}


@torch.no_grad()
def route_text(
    backbone: ElasticBackbone,
    policy: DynamicPolicy,
    tokenizer: PreTrainedTokenizerBase,
    batches: Iterable[Batch],
    forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> RoutedText:
    """Run a text through the full network and through a router's choices, and note what every token got.

    Args:
        backbone: the elastic network.
        policy: a dynamic router at one budget.
        tokenizer: of the network.
        batches: stretches of text, a row each: `input_ids`, `labels` and, for packed documents, `position_ids`, [B, T].
        forward_context: around the forward passes, for example an autocast.
    """
    device, recording = backbone.model.device, Recording(policy)
    full = backbone.space.full()
    pieces: list[Piece] = []
    begins, choices, losses, full_losses = [], [], [], []
    for batch in batches:
        moved = {name: tensor.to(device) for name, tensor in batch.items()}
        full_losses.append(_losses(backbone, full, moved, forward_context))
        losses.append(_losses(backbone, recording, moved, forward_context))
        choices.append(recording.choices.flatten(0, 1).cpu())
        for row in batch["input_ids"].tolist():
            tokens = pieces[-1].stop if pieces else 0
            pieces += [piece.moved(tokens) for piece in pieces_of(row, tokenizer)]
        positions = batch.get("position_ids", torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]))
        begins.append(positions.flatten() == 0)
    got = given(torch.cat(choices), backbone.space, policy.table)
    measured = {"loss": torch.cat(losses), "full_loss": torch.cat(full_losses)}
    return RoutedText(pieces, token_classes(pieces), torch.cat(begins).cpu(), **got, **measured)


def _losses(
    backbone: ElasticBackbone,
    selection: Selection,
    batch: Batch,
    forward_context: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """Of predicting the token that follows, [B x T] in nats, nan where there is none to predict."""
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    with backbone.use(selection), forward_context():
        losses, predicted = token_cross_entropy(backbone.model(**inputs, use_cache=False).logits, batch["labels"])
    known = losses.masked_fill(~predicted, torch.nan)
    return F.pad(known, (0, 1), value=torch.nan).flatten().float().cpu()


def given(choices: Tensor, space: ElasticSpace, table: CostTable) -> dict[str, Tensor]:
    """What choices cost and how wide they are, token by token.

    Args:
        choices: int64 [tokens, 2L].
        space: the choices.
        table: the cost that the router was trained for.

    Returns:
        `cost` as a ratio of the full network's, `mlp_width` and `attention_width` as mean shares of the full width:
        float32 [tokens].
    """
    costs = table.padded.gather(1, choices.T)  # [2L, tokens]
    widths = width_ratios(space).gather(1, choices.T)
    of = {kind: [index for index, block in enumerate(space.blocks) if block.kind == kind] for kind in KINDS}
    means = {f"{kind}_width": widths[indices].mean(0) for kind, indices in of.items()}
    return {"cost": ((table.fixed + costs.sum(0)) / table.full).float(), **means}
