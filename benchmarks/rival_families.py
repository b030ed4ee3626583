"""What else one could choose of an elastic network than what its router answers, at the same cost.

The limit is what the router's answer costs by the latency table of the checkpoint, so all choices are of one cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from rival_tuning import Batch

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.costs.budget import Limit
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.routers.search import best_by
from flextron_lit.space import ElasticSpace, SubNetwork

EVALUATIONS = 60
"""Losses that evolution and the oracle measure for each target: the router knows some 50 for all of them."""
SEARCHED = {"uniform width": "uniform", "evolutionary search": "evolution", "oracle": "evolution"}
ORACLE = "oracle"


def limit_of(loaded: Loaded, answered: SubNetwork) -> Limit:
    """As much of the latency table as an answer takes."""
    (limit,) = loaded.routing().parse("0.5")
    return Limit(limit.table, limit.table.cost(answered), "as the router's answer")


def chosen(
    loaded: Loaded, way: str, answered: SubNetwork, text: Sequence[Batch], count: int = EVALUATIONS
) -> SubNetwork:
    """The best by measured losses.

    Args:
        loaded: the elastic network.
        way: of `SEARCHED`.
        answered: by the router, whose cost is the limit.
        text: what losses are measured on.
        count: losses that evolution measures.
    """
    loaded.backbone.model.eval()
    score, generator = MeasuredLoss(loaded.backbone, list(text)), torch.Generator().manual_seed(0)
    limits, search = [limit_of(loaded, answered)], SEARCHED[way]
    found = best_by(search, loaded.backbone.space, limits, score, count=count, generator=generator)  # type: ignore[arg-type]
    # what is asked for its loss anyway
    return min(found.sub_network, answered, key=score) if way == ORACLE else found.sub_network


def of_neurons(space: ElasticSpace, neurons: int) -> SubNetwork:
    """So many neurons in every MLP, attention whole: what MatFormer's networks are.

    Raises:
        SystemExit: if the checkpoint was not trained at that width.
    """
    mlp, *_ = (block for block in space.blocks if block.kind == "mlp")
    if neurons not in mlp.widths:
        raise SystemExit(f"the checkpoint has no MLPs of {neurons} neurons, but of {mlp.widths}")
    return space.uniform(mlp=neurons / mlp.full)


def short(batches: Mapping[str, Sequence[Batch]], tokens: int) -> list[Batch]:
    """The first tokens of the first batch of each text."""
    return [{name: tensor[:, :tokens] for name, tensor in each[0].items()} for each in batches.values()]
