"""The points of a trade-off, and those that the stages of a run validated last: the losses of summary and report."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from flextron_lit import checkpoint
from flextron_lit.checkpoint.folder import TRAIN_WEIGHTS
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.files.damage import damage, read_rows
from flextron_lit.space import KINDS
from flextron_lit.stages.validation import DYNAMIC, FULL, RANDOM, ROUTED, STATIC, UNIFORM

POINT_KINDS = (FULL, STATIC, DYNAMIC, UNIFORM, RANDOM)
LOSS = "loss (nats per token)"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A network, how good it is, and what it costs."""

    name: str
    kind: str
    """One of `POINT_KINDS`."""
    budget: float | str | None
    """The budget that it answers, as a ratio or as a user wrote it; None where there was none."""
    value: float
    """How good it is: a mean loss, or a score."""
    losses: Mapping[str, float]
    """What the value is the mean of, by domain or text, in nats per token; empty for a score."""
    widths: Mapping[str, float]
    """Mean share of the full width, by kind of block; empty where it is not known."""
    source: str
    """The run folder, or `evaluate`."""
    costs: Mapping[str, float] = field(default_factory=dict)
    """By the name of the cost, in its unit: those that are known; a dynamic router has its own cost alone."""
    own_cost: float = math.nan
    """What the stage's table says, nan without a stage; of a dynamic router the mean over domains."""
    own_ratio: float | None = None
    """The same relative to the full network; None where the table of an earlier release has no ratios."""
    interval: tuple[float, float] | None = None
    """95 % interval of the value, where there is one."""
    earlier: bool = False
    """Whether a later stage changed the weights."""

    @property
    def router(self) -> str:
        """The kind of router that chose it, static or dynamic; "" for what no router chose."""
        return self.kind if self.kind in (STATIC, DYNAMIC) else ""


@dataclass(frozen=True)
class Measure:
    """How good networks are, in one sense: what a trade-off shows against a cost."""

    name: str
    """For people, who choose by it."""
    title: str
    """Of the axis."""
    is_loss: bool = field(default=True, kw_only=True)
    """Whether the losses of a ladder can stand beside it."""
    points: Sequence[Point]


def validated(stages: Sequence[RunFolder]) -> list[Point]:
    """What stages watched, each by the last one that did; what it costs, nothing says yet.

    Args:
        stages: run folders of finished stages, in order.
    """
    trained = [checkpoint.read(stage.checkpoint).history[-1].get("stage") in TRAIN_WEIGHTS for stage in stages]
    found: dict[str, Point] = {}
    for number, stage in enumerate(stages):
        new = _last_table(stage, earlier=any(trained[number + 1 :]))
        routers = {each.router for each in new} - {""}
        # a stage that watches a kind of router says all there is to say of it
        found = {name: each for name, each in found.items() if each.router not in routers}
        found |= {each.name: each for each in new}
    return list(found.values())


def _last_table(stage: RunFolder, *, earlier: bool) -> list[Point]:
    """Of a stage, at the step that its checkpoint holds; empty where it watched no losses."""
    path = stage.path / "training.json"
    rows, held = read_rows(path), checkpoint.read(stage.checkpoint).history[-1].get("steps")
    with damage(path, "restore it, or delete it"):
        return _points(rows, held, stage.path.name, earlier=earlier)


def _points(rows: list[dict[str, Any]], held: int | None, stage: str, *, earlier: bool) -> list[Point]:
    step = held if any(row["step"] == held for row in rows) else rows[-1]["step"] if rows else None
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["step"] == step:
            by_name.setdefault(row["sub_network"], []).append(row)
    return [_point(each, stage, earlier=earlier) for each in by_name.values()]


def _point(rows: Sequence[Mapping[str, Any]], stage: str, *, earlier: bool) -> Point:
    """From a row a domain."""
    name = rows[0]["sub_network"]
    kind, budget = _kind_and_budget(name)
    # the only other column is the cost, by the name of the cost that the stage shows
    known = {"step", "sub_network", "domain", "loss", "perplexity", "cost_ratio", *(f"{kind}_width" for kind in KINDS)}
    (column,) = rows[0].keys() - known
    return Point(
        name=name,
        kind=kind,
        budget=budget,
        value=fmean(row["loss"] for row in rows),
        losses={row["domain"]: row["loss"] for row in rows},
        widths={kind: fmean(row[f"{kind}_width"] for row in rows) for kind in KINDS},
        source=stage,
        own_cost=fmean(row[column] for row in rows),
        own_ratio=fmean(row["cost_ratio"] for row in rows) if "cost_ratio" in rows[0] else None,
        earlier=earlier,
    )


def _kind_and_budget(name: str) -> tuple[str, float | None]:
    """What the name of something watched says of it."""
    for prefix, router in ((ROUTED, STATIC), (DYNAMIC, DYNAMIC)):
        if name.startswith(prefix):
            return router, float(name.removeprefix(prefix))
    if name == FULL:
        return FULL, None
    return RANDOM if name.startswith(RANDOM) else UNIFORM, None
