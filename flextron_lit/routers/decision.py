"""A sub-network for a budget, and what there is to say of how it was found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flextron_lit.costs import CostTable
from flextron_lit.space import ElasticSpace, SubNetwork


@dataclass(frozen=True)
class Selection:
    """What `select` answers."""

    budget: str
    sub_network: SubNetwork
    how: str
    """The search, and what it went by."""
    loss: float | None
    """Measured, in nats per token; None where nothing was measured."""
    predicted: float | None = None
    """Predicted by the surrogate, in nats per token; None where it was not asked."""
    calibrated: float | None = None
    """Measured when the router's ladder was made, in nats per token; None where its losses are predicted."""


def to_json(selection: Selection, space: ElasticSpace, tables: Mapping[str, CostTable]) -> dict[str, Any]:
    """An answer, for scripts."""
    sub_network = selection.sub_network
    widths = zip(space.blocks, space.widths(sub_network), strict=True)
    return {
        "budget": selection.budget,
        "how": selection.how,
        "loss": selection.loss,
        "predicted_loss": selection.predicted,
        "calibration_loss": selection.calibrated,
        "sub_network": sub_network.to_json(),
        "widths": {block.name: width for block, width in widths},
        "costs": {
            name: {"cost": table.cost(sub_network), "unit": table.unit, "ratio": table.ratio(sub_network)}
            for name, table in tables.items()
        },
    }
