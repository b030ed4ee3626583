"""`python main.py reroute`: a router for another device or cost, from the kept surrogate."""

from collections.abc import Sequence

import torch
from rich.table import Table

from flextron_lit import checkpoint
from flextron_lit.commands.options import CommandLine, costs_of, place_of, refuse_below_one, refuse_workload
from flextron_lit.costs import COUNTED, CostTable
from flextron_lit.routers.from_surrogate import train_router
from flextron_lit.routers.ladder import Ladder
from flextron_lit.routers.trained import FOLDER, TrainedRouter, TrainedSurrogate, name_of
from flextron_lit.terminal.console import show, table

SHOWN = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def summary(ladder: Ladder, cost: CostTable) -> Table:
    """What a ladder answers to some budgets, for people."""
    smallest = ladder.rungs[0]
    answers = {budget: ladder.at(budget * cost.full) for budget in SHOWN if budget * cost.full > smallest.cost}
    answers |= {smallest.cost / cost.full: smallest}
    rows = [
        (f"{budget:.3g}", cost.short(rung.cost), f"{rung.cost / cost.full:.3f}", f"{rung.loss:.3f}")
        for budget, rung in answers.items()
    ]
    columns = ("budget", cost.name, "of the full network", "predicted loss")
    return table(columns, rows, title=f"the router for {cost.name}: {len(ladder.rungs)} sub-networks")


def command(args: Sequence[str]) -> None:
    """Train a static router for the cost tables that a checkpoint holds now, from its kept surrogate without the LLM.

    After `profile` on another device, or for another cost. Example: main.py reroute --checkpoint
    runs/quickstart/static_router --cost parameters
    """
    parser = CommandLine.on_checkpoint(command)
    parser.add_argument("--cost", type=str, default="latency", help=f"latency, prefill, decode, {', '.join(COUNTED)}.")
    parser.add_costs()
    parser.add_argument("--steps", type=int, default=1000, help="Updates of the router.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed of first weights, noise and budgets.")
    parser.add_argument("--fresh", action="store_true", help="Replace a router that is there for the same cost table.")
    options = parser.parse_args(list(args))
    refuse_below_one(options, "steps")
    folder, device = place_of(options)
    space = checkpoint.read(folder).space
    surrogate = TrainedSurrogate.read(folder, space)
    if surrogate is None:
        raise ValueError(
            f"{folder} holds no surrogate to train from: run the surrogate stage first (configs/stages/surrogate.yaml)"
        )
    surrogate.refuse_stale(folder)
    tables, latency = costs_of(options, folder, device)
    refuse_workload(options, latency)
    if options.cost not in tables:
        hint = "; measure latencies with `python main.py profile`" if options.cost not in COUNTED else ""
        raise ValueError(f"there is no cost {options.cost!r}; there are {', '.join(tables)}{hint}")
    name = name_of(TrainedRouter.kind, tables[options.cost])
    if (folder / FOLDER / f"{name}.json").is_file() and not options.fresh:
        raise ValueError(f"{folder} has a router for this cost table, {name}; --fresh trains another in its place")
    # the networks are tiny: threads would wait for each other
    torch.set_num_threads(1)
    router = train_router(space, tables[options.cost], surrogate, steps=options.steps, seed=options.seed)
    checkpoint.extend(folder, folder, files=router.files())
    show(summary(router.ladder, router.table), f"wrote {folder / f'routers/{router.name}.json'}")
