"""`python main.py diff`: how two Flextron checkpoints differ."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.table import Table
from torch import Tensor

from flextron_lit import checkpoint
from flextron_lit.checkpoint import FlextronCheckpoint
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.checkpoint.weights import OTHER, PARTS, Weights, part_of
from flextron_lit.files.differences import differences, listed
from flextron_lit.space import ElasticSpace
from flextron_lit.terminal.console import end_with_the_reader, ranges, show, two_columns

CHUNK = 1 << 22
"""Elements compared at once: bounds what a large embedding needs in float64."""
LINE = 160
NAMED_TENSORS = 5


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of two checkpoints differs, in float64."""

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
        return _relative(self.squared, self.squared_before)


# --- what differs -----------------------------------------------------------------------------------------------


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
    }
    parts["weights"] = compare_weights(Weights(before), Weights(after))
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
    other_form = {
        name: f"{old[name].dtype} {list(old[name].shape)} -> {new[name].dtype} {list(new[name].shape)}"
        for name in old
        if name in new and old[name] != new[name]
    }
    comparable = [name for name in old if name in new and old[name].shape == new[name].shape]
    tensors = {name: compare_tensors(before.tensor(name), after.tensor(name)) for name in comparable}
    only = {"only_in_first": sorted(set(old) - set(new)), "only_in_second": sorted(set(new) - set(old))}
    if all(tensor.equal for tensor in tensors.values()) and not other_form and not any(only.values()):
        return {}
    return {
        "parts": _by_part(tensors),
        "tensors": {
            name: {"largest": _number(tensor.largest), "relative": _number(tensor.relative)}
            for name, tensor in sorted(tensors.items(), key=lambda item: _rank(item[1]))
            if not tensor.equal
        },
        "other_form": other_form,
        **only,
    }


def compare_tensors(before: Tensor, after: Tensor) -> TensorDifference:
    """Compare two tensors of one shape, piece by piece."""
    old, new = before.flatten(), after.flatten()
    equal = old.dtype == new.dtype and torch.equal(old.view(torch.uint8), new.view(torch.uint8))
    largest = squared = squared_before = 0.0
    for one, other in zip(old.split(CHUNK), new.split(CHUNK), strict=True):
        one_wide = one.double()
        squared_before += one_wide.square().sum().item()
        if not equal and len(one):
            apart = other.double() - one_wide
            # torch's maximum keeps a NaN, Python's may drop it
            largest = torch.tensor([largest, apart.abs().max().item()], dtype=torch.float64).max().item()
            squared += apart.square().sum().item()
    return TensorDifference(equal, largest, squared, squared_before)


def _by_part(tensors: Mapping[str, TensorDifference]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for part in (*PARTS, OTHER):
        inside = [tensor for name, tensor in tensors.items() if part_of(name) == part]
        if inside:
            largest = torch.tensor([t.largest for t in inside], dtype=torch.float64).max().item()
            relative = _relative(sum(t.squared for t in inside), sum(t.squared_before for t in inside))
            equal = sum(t.equal for t in inside)
            parts[part] = {
                "tensors": len(inside),
                "equal": equal,
                "largest": _number(largest),
                "relative": _number(relative),
            }
    return parts


def _relative(squared: float, squared_before: float) -> float:
    if squared_before == 0:
        return 0.0 if squared == 0 else math.inf
    return math.sqrt(squared / squared_before)


def _rank(tensor: TensorDifference) -> float:
    """Sorts what changed most to the front, NaN before everything."""
    return -math.inf if math.isnan(tensor.relative) else -tensor.relative


def _number(value: float) -> float | str:
    """JSON knows no NaN and no infinity."""
    return value if math.isfinite(value) else str(value)


# --- on a screen ------------------------------------------------------------------------------------------------


def report(difference: Mapping[str, Any]) -> Iterator[Table | str]:
    """What `diff` prints: a section for everything that differs, one line on the rest."""
    differing = [name for name, part in difference.items() if name != "identical" and part]
    if not differing:
        yield "identical"
        return
    for name in ("space", "config", "history", "files"):
        if difference[name]:
            yield f"\n{name}"
            yield from _listed(difference[name])
    if difference["order"]:
        yield f"\norder: {len(difference['order'])} blocks are sorted differently; their weights stand elsewhere"
        yield from _listed([f"{block}: {units} units" for block, units in difference["order"].items()])
    if difference["weights"]:
        yield from _weights(difference["weights"])
    same = [name for name in difference if name != "identical" and name not in differing]
    yield f"\ndiffering: {', '.join(differing)}; the same: {', '.join(same) or 'nothing'}"


def _listed(lines: Sequence[str]) -> Iterator[str]:
    return listed([line if len(line) <= LINE else f"{line[:LINE]} ..." for line in lines])


def _weights(weights: Mapping[str, Any]) -> Iterator[Table | str]:
    yield "\nweights"
    table = Table()
    for column in ("part", "tensors", "equal", "largest difference", "relative norm of the difference"):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for name, part in weights["parts"].items():
        table.add_row(name, str(part["tensors"]), str(part["equal"]), _shown(part["largest"]), _shown(part["relative"]))
    if weights["parts"]:
        yield table
    rows = [
        (name, f"largest {_shown(tensor['largest'])}, relative {_shown(tensor['relative'])}")
        for name, tensor in list(weights["tensors"].items())[:NAMED_TENSORS]
    ]
    if rows:
        yield two_columns("tensors that differ most", rows)
    yield from _listed([f"{name}: {forms}" for name, forms in weights["other_form"].items()])
    yield from _listed([f"{name}: only in the first" for name in weights["only_in_first"]])
    yield from _listed([f"{name}: only in the second" for name in weights["only_in_second"]])


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def command(args: Sequence[str]) -> int:
    """`python main.py diff`: 0 if nothing differs, 1 if something does."""
    end_with_the_reader()
    parser = ArgumentParser(
        prog="main.py diff",
        description="How two Flextron checkpoints differ. Exit code: 0 if they are identical, 1 if not, 2 on an error. "
        "Example: main.py diff runs/one runs/two",
    )
    parser.add_argument("first", type=Path, help=FOLDER_HELP)
    parser.add_argument("second", type=Path, help="As the first; the lines read first -> second.")
    parser.add_argument("--json", action="store_true", help="Print JSON, for scripts.")
    options = parser.parse_args(list(args))
    first, second = locate(options.first), locate(options.second)
    difference = compare(first.checkpoint, second.checkpoint)
    if options.json:
        print(json.dumps({"first": str(first.checkpoint), "second": str(second.checkpoint), **difference}, indent=1))
    else:
        show(f"first: {first}", f"second: {second}", *report(difference))
    return 0 if difference["identical"] else 1
