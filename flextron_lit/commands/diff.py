"""`python main.py diff`: how two Flextron checkpoints differ."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.table import Table

from flextron_lit.checkpoint.comparison import compare
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.files.differences import listed
from flextron_lit.files.whole_file import json_text
from flextron_lit.terminal.console import about, end_with_the_reader, show, table, two_columns

LINE = 160
NAMED_TENSORS = 5


def report(difference: Mapping[str, Any]) -> Iterator[Table | str]:
    """What `diff` prints: a section for everything that differs, one line on the rest."""
    parts = {name: part for name, part in difference.items() if name != "identical"}
    differing = [name for name, part in parts.items() if part]
    if not differing:
        yield "identical"
        return
    for name in ("space", "config", "history", "files"):
        if parts[name]:
            yield f"\n{name}"
            yield from _listed(parts[name])
    if parts["order"]:
        yield f"\norder: {len(parts['order'])} blocks are sorted differently; their weights stand elsewhere"
        yield from _listed([f"{block}: {units} units" for block, units in parts["order"].items()])
    if parts["weights"]:
        yield from _weights(parts["weights"])
    same = [name for name in parts if name not in differing]
    yield f"\ndiffering: {', '.join(differing)}; the same: {', '.join(same) or 'nothing'}"


def _listed(lines: Sequence[str]) -> Iterator[str]:
    return listed([line if len(line) <= LINE else f"{line[:LINE]} ..." for line in lines])


def _weights(weights: Mapping[str, Any]) -> Iterator[Table | str]:
    yield "\nweights"
    columns = ("part", "tensors", "equal", "largest difference", "relative norm of the difference")
    rows = [
        (name, str(part["tensors"]), str(part["equal"]), _shown(part["largest"]), _shown(part["relative"]))
        for name, part in weights["parts"].items()
    ]
    if rows:
        yield table(columns, rows, left=["part"])
    most = [
        (name, f"largest {_shown(tensor['largest'])}, relative {_shown(tensor['relative'])}")
        for name, tensor in list(weights["tensors"].items())[:NAMED_TENSORS]
    ]
    if most:
        yield two_columns("tensors that differ most", most)
    yield from _listed([f"{name}: {forms}" for name, forms in weights["other_form"].items()])
    yield from _listed([f"{name}: only in the first" for name in weights["only_in_first"]])
    yield from _listed([f"{name}: only in the second" for name in weights["only_in_second"]])


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def command(args: Sequence[str]) -> int:
    """How two Flextron checkpoints differ.

    Exit code: 0 if they are identical, 1 if not, 2 on an error. Example: main.py diff runs/one runs/two
    """
    end_with_the_reader()
    parser = ArgumentParser(**about(command))
    parser.add_argument("first", type=Path, help=FOLDER_HELP)
    parser.add_argument("second", type=Path, help="As the first; the lines read first -> second.")
    parser.add_argument("--json", action="store_true", help="Print JSON, for scripts.")
    options = parser.parse_args(list(args))
    first, second = locate(options.first), locate(options.second)
    difference = compare(first.checkpoint, second.checkpoint)
    if options.json:
        show(json_text({"first": str(first.checkpoint), "second": str(second.checkpoint), **difference}).rstrip())
    else:
        show(f"first: {first}", f"second: {second}", *report(difference))
    return 0 if difference["identical"] else 1
