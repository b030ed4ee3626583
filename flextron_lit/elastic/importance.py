"""Which units matter, and the joint permutation that puts them first (paper, importance sorting)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock

Batch = Mapping[str, Tensor]


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


@torch.no_grad()
def measure(backbone: ElasticBackbone, batches: Iterable[Batch]) -> list[Tensor]:
    """Importance of every unit of every block, from the full network on calibration batches.

    Args:
        backbone: the elastic network, on the device to run on.
        batches: each with `input_ids` [B, T] and, for packed documents, `position_ids` [B, T].

    Returns:
        One tensor [units] a block, in the order of the space.

    Raises:
        ValueError: if there is no batch.
    """
    totals = [torch.zeros(e.block.full, dtype=torch.float64) for e in backbone.blocks]
    seen = 0
    with ExitStack() as stack:
        stack.enter_context(backbone.use(backbone.space.full()))
        stack.enter_context(_evaluating(backbone.model))
        for elastic, total in zip(backbone.blocks, totals, strict=True):
            stack.callback(_listen(elastic, total, heads_per_unit(backbone, elastic)).remove)
        for batch in batches:
            inputs = {k: batch[k].to(backbone.model.device) for k in ("input_ids", "position_ids") if k in batch}
            backbone.model(**inputs, use_cache=False, logits_to_keep=1)
            seen += 1
    if not seen:
        raise ValueError("importance needs at least one calibration batch, got none")
    return totals


def heads_per_unit(backbone: ElasticBackbone, elastic: ElasticBlock) -> int:
    """Query heads of a KV group; 1 for a neuron."""
    if elastic.block.kind == "mlp":
        return 1
    return int(backbone.model.config.num_attention_heads) // elastic.block.full


def _listen(elastic: ElasticBlock, total: Tensor, heads: int) -> torch.utils.hooks.RemovableHandle:
    def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        total.add_(unit_magnitude(inputs[0], elastic.block.full, heads).cpu())

    return elastic.output.register_forward_pre_hook(add)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def falling_order(importance: Sequence[Tensor]) -> list[Tensor]:
    """Unit indices by falling importance, ties in their present order: one [units] a block."""
    return [torch.argsort(scores, descending=True, stable=True) for scores in importance]


def inverse_order(orders: Sequence[Tensor]) -> list[Tensor]:
    """The orders that undo `orders`, bit for bit."""
    return [torch.argsort(order) for order in orders]


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
