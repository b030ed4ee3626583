"""`python main.py profile`: the latency table of this device."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.table import Table

from flextron_lit import checkpoint
from flextron_lit.checkpoint.folder import read_record
from flextron_lit.checkpoint.in_memory import shape_of
from flextron_lit.checkpoint.location import locate
from flextron_lit.commands.options import CommandLine, refuse_compiled, workload_of
from flextron_lit.costs.workload import Workload
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.files.whole_file import json_text
from flextron_lit.latency.block_times import profile
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.latency_table import COMPILED, FOLDER, LatencyTable, conditions, find
from flextron_lit.latency.miss import points
from flextron_lit.latency.recheck import recheck
from flextron_lit.latency.request import REQUEST
from flextron_lit.latency.routed_times import profile_dynamic
from flextron_lit.space import KINDS, ElasticSpace
from flextron_lit.terminal.console import show, table

HELD_OUT_HELP = "Sub-networks to check it on, and to correct it by if there are 4; 0 leaves the check out."
SHARE = 1 / 6
"""Of the time for a table, for checking one that is there."""


def summary(measured: LatencyTable, space: ElasticSpace) -> Table:
    """What a latency table says, for people."""
    of = "a dynamic router, " if measured.execution == "dynamic" else ""
    of += "compiled widths, " if measured.compiled else ""
    title = f"latency of {of}{measured.workload.name} on {measured.conditions['device']['name']}, milliseconds"
    return table(("", *measured.phases), list(_rows(measured, space)), left=[""], title=title)


def _rows(measured: LatencyTable, space: ElasticSpace) -> Iterator[Sequence[str]]:
    dynamic, phases = measured.execution == "dynamic", measured.phases.values()
    tables = [phase.table for phase in phases]
    yield "full network", *(f"{t.full:.2f}" for t in tables)
    if dynamic:
        yield "routed, all at full width", *(f"{t.cost(space.full()):.2f}" for t in tables)
    yield "all but the blocks", *(f"{t.fixed:.2f}" for t in tables)
    for kind in KINDS:
        of_kind = [(index, block.widths) for index, block in enumerate(space.blocks) if block.kind == kind]
        for width in sorted({width for _, widths in of_kind for width in widths}):
            places = [(index, widths.index(width)) for index, widths in of_kind if width in widths]
            cells = (f"{mean(t.blocks[index][choice] for index, choice in places):.3f}" for t in tables)
            yield f"one {kind}, width {width}", *cells
    yield "routed, all at least width" if dynamic else "smallest network", *(f"{t.smallest:.2f}" for t in tables)
    yield "spread of a ratio", *(f"{phase.spread:.1%}" for phase in phases)
    errors = ("not checked" if phase.error is None else f"{phase.error:.1%}" for phase in phases)
    yield f"error on held-out {'mixtures' if dynamic else 'networks'}", *errors
    yield "they corrected savings by a factor of", *(f"{phase.correction:.3f}" for phase in phases)
    misses = (phase.largest_miss for phase in phases)
    yield "may miss by", *("not checked" if miss is None else points(miss) for miss in misses)


def reach(folder: Path, wanted: Mapping[str, Any]) -> Iterator[str]:
    """What budgets of the request's latency can reach, as the network is and compiled, where both were measured."""
    conditions = {name: value for name, value in wanted.items() if name != COMPILED}
    found = [find(folder, each) for each in (conditions, {**conditions, COMPILED: True})]
    if all(found):
        plain, compiled = (each[1].tables()[REQUEST] for each in found if each)
        yield (
            f"budgets of latency reach down to {plain.smallest_ratio:.3f} of {plain.show(plain.full)} as the network "
            f"is, and to {compiled.smallest_ratio:.3f} of {compiled.show(compiled.full)} compiled"
        )


def kept(measured: LatencyTable, folder: Path) -> Path:
    """Put a latency table into a checkpoint, beside what it was written with or in place of that; returns its path."""
    path = folder / FOLDER / measured.file_name
    name = path.relative_to(folder).as_posix()
    if name not in read_record(folder).get("sha256", {}):
        return measured.write(folder)
    # a noted digest would call the new one damage
    checkpoint.extend(folder, folder, files={name: json_text(measured.to_json()).encode()})
    return path


def command(args: Sequence[str]) -> None:
    """Measure the latency of every block at every width on this device, with the table's error on other sub-networks.

    With --dynamic, those of a dynamic router, whose tokens take different widths; with --compile, a table of compiled
    widths beside the one of the network as it is. A table goes into the checkpoint, in place of one for the same kind
    of device and workload, such as another CPU's; of one that is there a few fresh networks say whether it still holds.
    Example: main.py profile --checkpoint runs/quickstart/elastic --workload chat
    """
    parser = CommandLine.on_checkpoint(command)
    parser.add_workload()
    parser.add_device()
    parser.add_argument("--seconds", type=float, default=60.0, help="For the table; its check takes as long again.")
    parser.add_argument("--held_out", type=int, default=20, help=HELD_OUT_HELP)
    parser.add_compile()
    parser.add_argument("--dynamic", action="store_true", help="Measure the table of a dynamic router.")
    parser.add_argument("--fresh", action="store_true", help="Measure again what is measured already.")
    options = parser.parse_args(list(args))
    refuse_compiled(options, "dynamic")
    folder = locate(options.checkpoint).checkpoint
    space, workload = checkpoint.read(folder).space, workload_of(options)
    # not where the latencies that are there were measured: to measure elsewhere is what the command is for
    device = device_of(options.device)
    backbone = shape_of(folder, space, dtype=getattr(torch, workload.dtype), device=device)
    wanted: Mapping[str, Any] = {}
    for compiled in (False, True) if options.compile else (False,):
        backbone.compile_widths(compiled)
        wanted = conditions(backbone, workload, "dynamic" if options.dynamic else "static")
        for said in profiled(backbone, workload, wanted, folder, options):
            show(said)
    show(*reach(folder, wanted))


def profiled(
    backbone: ElasticBackbone, workload: Workload, wanted: Mapping[str, Any], folder: Path, options: Any
) -> Iterator[Table | str]:
    """Find the table of some conditions and check it, or measure it; says what it is."""
    known = None if options.fresh else find(folder, wanted)
    if known is not None:
        path, measured = known
        yield from (summary(measured, backbone.space), f"measured already: {path}; --fresh measures again")
        again = recheck(backbone, measured, budget_seconds=options.seconds * SHARE)
        yield again.told() if again.holds else f"{again.told()}. Measure again with --fresh."
        return
    measure = profile_dynamic if options.dynamic else profile
    measured = measure(backbone, workload, budget_seconds=options.seconds, held_out=options.held_out)
    yield from (summary(measured, backbone.space), f"wrote {kept(measured, folder)}")
