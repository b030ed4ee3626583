"""How two Flextron checkpoints differ."""

import filecmp
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flextron_lit import checkpoint
from flextron_lit.checkpoint import FlextronCheckpoint
from flextron_lit.checkpoint.weights import OTHER, PARTS, Weights, part_of
from flextron_lit.files.differences import differences
from flextron_lit.space import ElasticSpace
from flextron_lit.terminal.console import ranges

CHUNK = 1 << 22
"""Elements compared at once: bounds what a large embedding needs in float64."""


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of two checkpoints differs, in float64; or several together."""

    equal: bool
    """Bit for bit, in shape and dtype too."""
    largest: float
    """Largest absolute difference of an element."""
    squared: float
    """Sum of the squared differences."""
    squared_before: float
    """Sum of the first one's squared elements."""

    @property
    def relative(self) -> float:
        """Norm of the difference over the norm of the first one."""
        if self.squared_before == 0:
            return 0.0 if self.squared == 0 else math.inf
        return math.sqrt(self.squared / self.squared_before)

    def to_json(self) -> dict[str, float | str]:
        """How large it is; JSON knows no NaN and no infinity."""
        found = {"largest": self.largest, "relative": self.relative}
        return {name: value if math.isfinite(value) else str(value) for name, value in found.items()}


def compare(before: Path, after: Path) -> dict[str, Any]:
    """All differences of two checkpoints, JSON-able; every part is empty where they are the same.

    Raises:
        ValueError: if one of them is damaged.
    """
    old, new = checkpoint.read(before), checkpoint.read(after)
    parts: dict[str, Any] = {
        "space": list(_widths(old.space, new.space)),
        "config": list(differences(checkpoint.read_config(before), checkpoint.read_config(after))),
        "history": list(differences(*_numbered(old.history, new.history))),
        "order": moved_units(old, new),
        "files": list(_other_files(before, after)),
        "weights": compare_weights(*(Weights(folder, compensation=True) for folder in (before, after))),
    }
    return {"identical": not any(parts.values()), **parts}


def _widths(before: ElasticSpace, after: ElasticSpace) -> Iterator[str]:
    """Lines `layers LAYERS, KIND: old -> new`, one for all layers that changed alike."""
    old = {(block.kind, block.layer): list(block.widths) for block in before.blocks}
    new = {(block.kind, block.layer): list(block.widths) for block in after.blocks}
    layers: dict[str, list[int]] = {}
    for kind, layer in sorted(old.keys() | new.keys()):
        for change in differences({kind: old.get((kind, layer))}, {kind: new.get((kind, layer))}):
            layers.setdefault(change, []).append(layer)
    for change, numbers in layers.items():
        yield f"layers {ranges(numbers)}, {change}"


def _numbered(before: Sequence[Mapping], after: Sequence[Mapping]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stages by number; one that the other side lacks in a few words, since every line of it would differ."""
    shared = min(len(before), len(after))

    def rows(history: Sequence[Mapping]) -> dict[str, Any]:
        brief = (f"{r.get('stage')}, {r.get('steps')} steps from {r.get('source')}" for r in history[shared:])
        return {f"stage {number}": row for number, row in enumerate([*history[:shared], *brief], 1)}

    return rows(before), rows(after)


def moved_units(before: FlextronCheckpoint, after: FlextronCheckpoint) -> dict[str, int]:
    """Per block that is sorted differently, how many of its units stand elsewhere."""
    other = dict(zip((block.name for block in after.space.blocks), after.order, strict=True))
    moved = {}
    for block, order in zip(before.space.blocks, before.order, strict=True):
        there = other.get(block.name)
        if there is not None and len(there) == len(order) and not torch.equal(order, there):
            moved[block.name] = int((order != there).sum())
    return moved


def _other_files(before: Path, after: Path) -> Iterator[str]:
    """Differing files beside those that are compared by what they say: tokenizer, cost tables, routers."""
    old, new = checkpoint.other_files(before), checkpoint.other_files(after)
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"{name}: only in the first"
        elif name not in old:
            yield f"{name}: only in the second"
        elif not filecmp.cmp(old[name], new[name], shallow=False):
            yield f"{name}: differs"


# --- weights ----------------------------------------------------------------------------------------------------


def compare_weights(before: Weights, after: Weights) -> dict[str, Any]:
    """Differences tensor by tensor and per part of the network; empty if all tensors are equal."""
    old, new = before.headers, after.headers
    both = [name for name in old if name in new]
    found = {
        "other_form": {name: f"{old[name]} -> {new[name]}" for name in both if old[name] != new[name]},
        "only_in_first": sorted(old.keys() - new.keys()),
        "only_in_second": sorted(new.keys() - old.keys()),
    }
    comparable = [name for name in both if old[name].shape == new[name].shape]
    tensors = {name: compare_tensors(before.tensor(name), after.tensor(name)) for name in comparable}
    differing = {name: tensor for name, tensor in tensors.items() if not tensor.equal}
    if not differing and not any(found.values()):
        return {}
    changed_most_first = sorted(differing.items(), key=lambda item: _rank(item[1]))
    return {
        "parts": _by_part(tensors),
        "tensors": {name: tensor.to_json() for name, tensor in changed_most_first},
        **found,
    }


def compare_tensors(before: Tensor, after: Tensor) -> TensorDifference:
    """Compare two tensors of one shape, piece by piece."""
    old, new = before.flatten(), after.flatten()
    # bit for bit: so the same NaNs are no difference, and zeros of two signs are one
    if old.dtype == new.dtype and torch.equal(old.view(torch.uint8), new.view(torch.uint8)):
        return TensorDifference(True, 0.0, 0.0, sum(piece.double().square().sum().item() for piece in old.split(CHUNK)))
    pieces = zip(old.split(CHUNK), new.split(CHUNK), strict=True)
    return _together(_compare_pieces(one.double(), other.double()) for one, other in pieces)


def _compare_pieces(one: Tensor, other: Tensor) -> TensorDifference:
    apart = other - one
    largest = apart.abs().max().item() if len(apart) else 0.0
    return TensorDifference(False, largest, apart.square().sum().item(), one.square().sum().item())


def _together(tensors: Iterable[TensorDifference]) -> TensorDifference:
    """Several as one."""
    found = list(tensors)
    # torch's maximum keeps a NaN, Python's may drop it
    largest = torch.tensor([each.largest for each in found], dtype=torch.float64).max().item()
    squared, squared_before = (sum(each.squared for each in found), sum(each.squared_before for each in found))
    return TensorDifference(all(each.equal for each in found), largest, squared, squared_before)


def _by_part(tensors: Mapping[str, TensorDifference]) -> dict[str, dict[str, Any]]:
    parts = {}
    for part in (*PARTS, OTHER):
        inside = [tensor for name, tensor in tensors.items() if part_of(name) == part]
        if inside:
            counts = {"tensors": len(inside), "equal": sum(tensor.equal for tensor in inside)}
            parts[part] = {**counts, **_together(inside).to_json()}
    return parts


def _rank(tensor: TensorDifference) -> float:
    """Sorts what changed most to the front, NaN before everything."""
    return -math.inf if math.isnan(tensor.relative) else -tensor.relative
