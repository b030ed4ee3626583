"""Which units matter, and the joint permutation that puts them first (paper, importance sorting)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock

Batch = Mapping[str, Tensor]
Score = Callable[[Tensor], Tensor]
"""What a block's output projection reads, [..., units x rows of a unit], to the importance of each unit, [units]."""


def unit_magnitude(activations: Tensor, units: int, heads_per_unit: int) -> Tensor:
    """Summed magnitude of each unit over all tokens.

    Paper: `sum |x W1_i|` for neuron i (for a gated MLP the hidden activation that enters `down`), `sum ||Attn_i(x)||`
    for head i before the output projection; summed over the heads of a KV group (ours).

    Args:
        activations: [..., units x rows of a unit], what the output projection reads.
        units: number of units.
        heads_per_unit: query heads of a KV group; 1 for neurons.

    Returns:
        [units], float64.
    """
    heads = activations.detach().flatten(0, -2).unflatten(-1, (units, heads_per_unit, -1))
    return heads.float().norm(dim=-1).sum((0, 2), dtype=torch.float64)


def outgoing_magnitude(activations: Tensor, gram: Tensor, units: int) -> Tensor:
    """Summed magnitude of what each unit adds to the residual stream (ours: a unit that nothing reads is no loss).

    `sum |h_i| ||down_i||` for neuron i, `sum ||o_i Attn_i(x)||` for head i, summed over the heads of a KV group.

    Args:
        activations: [..., heads x rows of a head], what the output projection reads; a neuron is a head of one row.
        gram: [heads, rows of a head, rows of a head], products of the outgoing weights of each head with each other.
        units: number of units.

    Returns:
        [units], float64.
    """
    heads = activations.detach().flatten(0, -2).unflatten(-1, (len(gram), -1)).transpose(0, 1).float()
    squared = ((heads @ gram) * heads).sum(-1)  # [heads, B x T]
    return squared.clamp(min=0).sqrt().sum(-1, dtype=torch.float64).unflatten(0, (units, -1)).sum(-1)


def _magnitude(elastic: ElasticBlock) -> Score:
    return partial(unit_magnitude, units=elastic.block.full, heads_per_unit=elastic.heads_per_unit)


def _outgoing(elastic: ElasticBlock) -> Score:
    heads = elastic.block.full * elastic.heads_per_unit
    weight = elastic.outgoing.detach().float().unflatten(0, (heads, -1))
    return partial(outgoing_magnitude, gram=weight @ weight.mT, units=elastic.block.full)


Importance = Literal["magnitude", "outgoing"]
SCORES: dict[Importance, Callable[[ElasticBlock], Score]] = {"magnitude": _magnitude, "outgoing": _outgoing}


@torch.no_grad()
def measure(backbone: ElasticBackbone, batches: Iterable[Batch], importance: Importance = "magnitude") -> list[Tensor]:
    """Importance of every unit of every block, from the full network on calibration batches.

    Args:
        backbone: the elastic network, on the device to run on.
        batches: each with `input_ids` [B, T] and, for packed documents, `position_ids` [B, T].
        importance: `magnitude` as in the paper, or `outgoing`, weighted by the outgoing weights.

    Returns:
        One tensor [units] a block, in the order of the space.

    Raises:
        ValueError: if there is no batch.
    """
    totals = [torch.zeros(e.block.full, dtype=torch.float64) for e in backbone.blocks]
    seen = 0
    with backbone.use(backbone.space.full()), backbone.evaluating(), ExitStack() as stack:
        for elastic, total in zip(backbone.blocks, totals, strict=True):
            stack.callback(_listen(elastic, total, SCORES[importance](elastic)).remove)
        for batch in batches:
            backbone.model(**inputs_of(backbone, batch), use_cache=False, logits_to_keep=1)
            seen += 1
    if not seen:
        raise ValueError("importance needs at least one calibration batch, got none")
    return totals


def inputs_of(backbone: ElasticBackbone, batch: Batch) -> dict[str, Tensor]:
    """What the network is given of a calibration batch, on its device."""
    return {k: batch[k].to(backbone.model.device) for k in ("input_ids", "position_ids") if k in batch}


def _listen(elastic: ElasticBlock, total: Tensor, score: Score) -> torch.utils.hooks.RemovableHandle:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        total.add_(score(inputs[0]).cpu())

    return elastic.output.register_forward_pre_hook(add)


def balanced(measured: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One importance from those of several texts, each counting the same (ours: loud texts do not drown the others).

    Args:
        measured: for each text one tensor [units] a block.

    Returns:
        One tensor [units] a block: the mean over texts of each unit's share of its block.
    """
    return [torch.stack([scores / scores.sum() for scores in block]).mean(0) for block in zip(*measured, strict=True)]


def falling_order(importance: Sequence[Tensor]) -> list[Tensor]:
    """Unit indices by falling importance, ties in their present order: one [units] a block."""
    return [torch.argsort(scores, descending=True, stable=True) for scores in importance]


@torch.no_grad()
def permute(backbone: ElasticBackbone, orders: Sequence[Tensor]) -> None:
    """Put the units of every block into a new order, in place and jointly in all tensors that carry them.

    The dense function stays the same up to the order of summation (fp32 logits of SmolLM2-135M: within 1e-4).

    Args:
        backbone: the elastic network.
        orders: one permutation [units] a block; position i takes the unit `order[i]`.

    Raises:
        ValueError: if an order is not a permutation of its block's units; nothing is then changed.
    """
    if len(orders) != len(backbone.blocks):
        raise ValueError(f"{len(orders)} orders for {len(backbone.blocks)} blocks")
    for elastic, order in zip(backbone.blocks, orders, strict=True):
        if not torch.equal(order.sort().values.cpu(), torch.arange(elastic.block.full)):
            name, units = elastic.block.name, elastic.block.full
            raise ValueError(f"the order of {name} is not a permutation of its {units} units")
    for elastic, order in zip(backbone.blocks, orders, strict=True):
        for axis, tensor in elastic.tensors:
            tensor.copy_(axis.permuted(tensor, order))
