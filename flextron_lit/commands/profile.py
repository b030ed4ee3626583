"""`python main.py profile`: the latency table of this device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from jsonargparse import ArgumentParser
from rich.table import Table
from transformers import AutoConfig

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import blank_elastic
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.commands.options import add_device, add_workload, workload_of
from flextron_lit.latency.block_times import profile
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.latency_table import LatencyTable, conditions, find
from flextron_lit.latency.routed_times import profile_dynamic
from flextron_lit.space import KINDS, ElasticSpace
from flextron_lit.terminal.console import show


def summary(table: LatencyTable, space: ElasticSpace) -> Table:
    """What a latency table says, for people."""
    dynamic = table.execution == "dynamic"
    of, smallest, held_out = (
        ("a dynamic router, ", "routed, all at least width", "mixtures")
        if dynamic
        else ("", "smallest network", "networks")
    )
    shown = Table(title=f"latency of {of}{table.workload.name} on {table.conditions['device']['name']}, milliseconds")
    for column in ("", *table.phases):
        shown.add_column(column, justify="left" if not column else "right", no_wrap=True)
    tables = [phase.table for phase in table.phases.values()]
    shown.add_row("full network", *(f"{t.full:.2f}" for t in tables))
    if dynamic:
        shown.add_row("routed, all at full width", *(f"{t.cost(space.full()):.2f}" for t in tables))
    shown.add_row("all but the blocks", *(f"{t.fixed:.2f}" for t in tables))
    for kind in KINDS:
        of_kind = [index for index, block in enumerate(space.blocks) if block.kind == kind]
        for width in sorted({w for index in of_kind for w in space.blocks[index].widths}):
            places = [(i, space.blocks[i].widths.index(width)) for i in of_kind if width in space.blocks[i].widths]
            cells = (f"{mean(t.blocks[i][choice] for i, choice in places):.3f}" for t in tables)
            shown.add_row(f"one {kind}, width {width}", *cells)
    shown.add_row(smallest, *(f"{t.smallest:.2f}" for t in tables))
    shown.add_row("spread of a ratio", *(f"{phase.spread:.1%}" for phase in table.phases.values()))
    errors = (phase.error for phase in table.phases.values())
    shown.add_row(f"error on held-out {held_out}", *("not checked" if e is None else f"{e:.1%}" for e in errors))
    return shown


def command(args: Sequence[str]) -> None:
    """`python main.py profile`."""
    parser = ArgumentParser(
        prog="main.py profile",
        description="Measure the latency of every block at every width on this device, with the table's own error on "
        "held-out sub-networks; with --dynamic, those of a dynamic router, whose tokens take different widths. It goes "
        "into the checkpoint, in place of a table for the same kind of device and workload, such as another CPU's. "
        "Example: main.py profile --checkpoint runs/quickstart/elastic --workload chat",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help=FOLDER_HELP)
    add_workload(parser)
    add_device(parser)
    parser.add_argument("--seconds", type=float, default=60.0, help="For the table; its check takes as long again.")
    parser.add_argument("--held_out", type=int, default=20, help="Sub-networks to check it on; 0 leaves the check out.")
    parser.add_argument("--dynamic", action="store_true", help="Measure the table of a dynamic router.")
    parser.add_argument("--fresh", action="store_true", help="Measure again what is measured already.")
    options = parser.parse_args(list(args))
    folder = locate(options.checkpoint).checkpoint
    record = checkpoint.read(folder)
    workload = workload_of(options)
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = "sdpa"
    dtype = getattr(torch, workload.dtype)
    backbone = blank_elastic(config, record.space, dtype=dtype, device=device_of(options.device))
    wanted = conditions(backbone, workload, "dynamic" if options.dynamic else "static")
    known = None if options.fresh else find(folder, wanted)
    if known is not None:
        path, table = known
        show(summary(table, record.space), f"measured already: {path}; --fresh measures again")
        return
    measure = profile_dynamic if options.dynamic else profile
    table = measure(backbone, workload, budget_seconds=options.seconds, held_out=options.held_out)
    path = table.write(folder)
    show(summary(table, record.space), f"wrote {path}")
