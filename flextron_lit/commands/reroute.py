"""`python main.py reroute`: a router for another device or cost, from the kept surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.table import Table

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import shape_of
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.commands.options import add_device, add_latency, add_workload, refuse_workload, workload_of
from flextron_lit.costs import COUNTED, CostTable
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.routers.from_surrogate import train_router
from flextron_lit.routers.ladder import Ladder
from flextron_lit.routers.trained import FOLDER, TrainedRouter, TrainedSurrogate, name_of
from flextron_lit.terminal.console import show

SHOWN = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def summary(ladder: Ladder, table: CostTable) -> Table:
    """What a ladder answers to some budgets, for people."""
    shown = Table(title=f"the router for {table.name}: {len(ladder.rungs)} sub-networks")
    for column in ("budget", table.name, "of the full network", "predicted loss"):
        shown.add_column(column, justify="right", no_wrap=True)
    smallest = ladder.rungs[0]
    rows = {budget: ladder.at(budget * table.full) for budget in SHOWN if budget * table.full > smallest.cost}
    for budget, rung in {**rows, smallest.cost / table.full: smallest}.items():
        shown.add_row(f"{budget:.3g}", table.short(rung.cost), f"{rung.cost / table.full:.3f}", f"{rung.loss:.3f}")
    return shown


def command(args: Sequence[str]) -> None:
    """`python main.py reroute`."""
    parser = ArgumentParser(
        prog="main.py reroute",
        description="Train a static router for the cost tables that a checkpoint holds now, from its kept surrogate "
        "and without the LLM: after `profile` on another device, or for another cost. "
        "Example: main.py reroute --checkpoint runs/quickstart/static_router --cost parameters",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help=FOLDER_HELP)
    parser.add_argument("--cost", type=str, default="latency", help=f"latency, prefill, decode, {', '.join(COUNTED)}.")
    add_latency(parser)
    add_workload(parser)
    add_device(parser)
    parser.add_argument("--steps", type=int, default=1000, help="Updates of the router.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of first weights, noise and budgets.")
    parser.add_argument("--fresh", action="store_true", help="Replace a router that is there for the same cost table.")
    options = parser.parse_args(list(args))
    if options.steps < 1:
        raise ValueError(f"steps must be 1 or more, not {options.steps}")
    folder = locate(options.checkpoint).checkpoint
    space = checkpoint.read(folder).space
    surrogate = TrainedSurrogate.read(folder, space)
    if surrogate is None:
        raise ValueError(
            f"{folder} holds no surrogate to train from: run the surrogate stage first (configs/stages/surrogate.yaml)"
        )
    surrogate.refuse_stale(folder)
    device = device_of(options.device, folder)
    tables, latency = known_tables(folder, shape_of(folder, space), workload_of(options), options.latency, device)
    refuse_workload(options, latency)
    if options.cost not in tables:
        hint = "; measure latencies with `python main.py profile`" if options.cost not in COUNTED else ""
        raise ValueError(f"there is no cost {options.cost!r}; there are {', '.join(tables)}{hint}")
    name = name_of(TrainedRouter.kind, tables[options.cost])
    if (folder / FOLDER / f"{name}.json").is_file() and not options.fresh:
        raise ValueError(f"{folder} has a router for this cost table, {name}; --fresh trains another in its place")
    torch.set_num_threads(1)
    router = train_router(space, tables[options.cost], surrogate, steps=options.steps, seed=options.seed)
    checkpoint.extend(folder, folder, files=router.files())
    show(summary(router.ladder, router.table), f"wrote {folder / f'routers/{router.name}.json'}")
