"""What the stages of a run validated last: the losses that its summary and its report show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from flextron_lit import checkpoint
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.files.damage import read_rows
from flextron_lit.space import KINDS
from flextron_lit.stages import TRAIN_WEIGHTS
from flextron_lit.stages.validation import DYNAMIC, FULL, RANDOM, ROUTED, STATIC, UNIFORM

POINT_KINDS = (FULL, STATIC, DYNAMIC, UNIFORM, RANDOM)
ROUTERS = {ROUTED: STATIC, DYNAMIC: DYNAMIC}
"""The kind of router by how the names of its answers begin."""


@dataclass(frozen=True)
class Validated:
    """A watched sub-network, or a router's answer to one budget, as a stage validated it last."""

    name: str
    losses: Mapping[str, float]
    """By domain, in nats per token on validation documents."""
    widths: Mapping[str, float]
    """Mean share of the full width, by kind of block."""
    own_cost: float
    """What the stage's table says; of a dynamic router the mean over domains, in the unit of its own cost."""
    stage: str
    """Name of the run folder."""
    earlier: bool
    """Whether a later stage changed the weights."""

    @property
    def router(self) -> str:
        """The kind of router that chose it, static or dynamic; "" for what no router chose."""
        return next((kind for prefix, kind in ROUTERS.items() if self.name.startswith(prefix)), "")

    @property
    def kind(self) -> str:
        """One of `POINT_KINDS`."""
        if self.name == FULL:
            return FULL
        return self.router or (RANDOM if self.name.startswith(RANDOM) else UNIFORM)

    @property
    def budget(self) -> float | None:
        """The budget that a router answers here; None for what no router chose."""
        return float(self.name.removeprefix(ROUTED).removeprefix(DYNAMIC)) if self.router else None

    @property
    def loss(self) -> float:
        """Mean over domains."""
        return fmean(self.losses.values())


def validated(stages: Sequence[RunFolder]) -> list[Validated]:
    """What stages watched, each by the last one that did.

    Args:
        stages: run folders of finished stages, in order.
    """
    trained = [_trains_weights(stage) for stage in stages]
    found: dict[str, Validated] = {}
    for number, stage in enumerate(stages):
        new = _last_table(stage, earlier=any(trained[number + 1 :]))
        kinds = {each.router for each in new} - {""}
        # a stage that watches a kind of router says all there is to say of it
        found = {name: each for name, each in found.items() if each.router not in kinds}
        found |= {each.name: each for each in new}
    return list(found.values())


def _trains_weights(stage: RunFolder) -> bool:
    return checkpoint.read(stage.checkpoint).history[-1].get("stage") in TRAIN_WEIGHTS


def _last_table(stage: RunFolder, *, earlier: bool) -> list[Validated]:
    """The last table of a stage; empty where it watched no losses."""
    rows = read_rows(stage.path / "training.json")
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] == rows[-1]["step"]:
            by_name.setdefault(row["sub_network"], []).append(row)
    return [_one(each, stage.path.name, earlier=earlier) for each in by_name.values()]


def _one(rows: Sequence[Mapping[str, Any]], stage: str, *, earlier: bool) -> Validated:
    """From a row a domain."""
    # the only other column is the cost, by the name of the cost that the stage shows
    known = {"step", "sub_network", "domain", "loss", "perplexity", *(f"{kind}_width" for kind in KINDS)}
    (column,) = rows[0].keys() - known
    return Validated(
        name=rows[0]["sub_network"],
        losses={row["domain"]: row["loss"] for row in rows},
        widths={kind: fmean(row[f"{kind}_width"] for row in rows) for kind in KINDS},
        own_cost=fmean(row[column] for row in rows),
        stage=stage,
        earlier=earlier,
    )
