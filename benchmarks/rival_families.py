"""What else one could choose of an elastic network than what its router answers, at the same cost.

The limit is what the router's answer costs by the latency table of the checkpoint, so all choices are of one cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from rival_tuning import Batch

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.costs.budget import Limit
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.routers.search import Search, best_by
from flextron_lit.space import KINDS, SubNetwork

EVALUATIONS = 60
"""Losses that evolution and the oracle measure for each target: the router knows some 50 for all of them."""
SEARCHED: dict[str, Search] = {"uniform width": "uniform", "evolutionary search": "evolution", "oracle": "evolution"}
ORACLE = "oracle"


def limit_of(loaded: Loaded, answered: SubNetwork) -> Limit:
    """As much of the latency table as an answer takes."""
    (limit,) = loaded.routing().parse("1.0")
    return Limit(limit.table, limit.table.cost(answered), "as the router's answer")


def chosen(
    loaded: Loaded,
    way: str,
    answered: SubNetwork,
    text: Sequence[Batch],
    count: int,
    computing: Callable[[], AbstractContextManager[Any]],
) -> SubNetwork:
    """The best by measured losses.

    Args:
        loaded: the elastic network.
        way: of `SEARCHED`.
        answered: by the router, whose cost is the limit.
        text: what losses are measured on.
        count: losses that evolution measures.
        computing: around forward passes.
    """
    loaded.backbone.model.eval()
    score = MeasuredLoss(loaded.backbone, list(text), forward_context=computing)
    limits, generator = [limit_of(loaded, answered)], torch.Generator().manual_seed(0)
    found = best_by(SEARCHED[way], loaded.backbone.space, limits, score, count=count, generator=generator)
    # what is asked for its loss anyway
    return min(found.sub_network, answered, key=score) if way == ORACLE else found.sub_network


def of_neurons(loaded: Loaded, neurons: int) -> SubNetwork:
    """So many neurons in every MLP, attention whole: what MatFormer's networks are.

    Raises:
        SystemExit: if the checkpoint was not trained at that width.
    """
    space = loaded.backbone.space
    mlp, *_ = (block for block in space.blocks if block.kind == "mlp")
    if neurons not in mlp.widths:
        raise SystemExit(f"the checkpoint has no MLPs of {neurons} neurons, but of {mlp.widths}")
    return space.uniform(mlp=neurons / mlp.full)


def of_layers(loaded: Loaded, layers: int) -> SubNetwork:
    """So many whole layers: those that conversion found the network does best without are skipped.

    Raises:
        SystemExit: if the checkpoint cannot skip so many.
    """
    space, excess = loaded.backbone.space, loaded.excess
    gone = len(space) // len(KINDS) - layers
    able = [] if excess is None else list(excess.layers)
    if gone > len(able):
        raise SystemExit(f"the checkpoint can skip {len(able)} layers, not {gone}")
    skipped, full = set(able[:gone]), space.full().choices
    choices = (0 if block.layer in skipped else whole for block, whole in zip(space.blocks, full, strict=True))
    return SubNetwork(tuple(choices))


def short(batches: Mapping[str, Sequence[Batch]], tokens: int) -> list[Batch]:
    """The first tokens of the first batch of each text."""
    return [{name: tensor[:, :tokens] for name, tensor in each[0].items()} for each in batches.values()]
