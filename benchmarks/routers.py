"""Routed sub-networks against uniform ones and an evolutionary search, at the same cost, on held-out documents.

    python benchmarks/routers.py --routers runs/router0 runs/router1 runs/router2 --count 400 --check

The routers are of one surrogate and one counted cost, and differ by their seed. For the exact cost of every uniform
sub-network below the full one: its loss, that of each router's answer, and that of an evolutionary search which
measures `--count` losses for that budget alone, on the tokens that the surrogate's pairs were measured on. "no router"
is what a search over the first router's surrogate finds from the full network. All answers are then measured on test
documents. Measured losses are kept in the cache: a second call goes on where one stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from held_out_text import flextron_folders, on_surrogate_text, on_test_documents

from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.costs import COUNTED, CostTable
from flextron_lit.costs.budget import Limit
from flextron_lit.routers.feasible_decoding import Bound, decode
from flextron_lit.routers.ladder import Ladder
from flextron_lit.routers.search import evolution, uniform_pairs
from flextron_lit.routers.trained import TrainedRouter, TrainedSurrogate
from flextron_lit.space import ElasticSpace, SubNetwork

WINS, MARGIN, GAP = 9, 0.05, 0.03


def routers_of(folders: list[Path], space: ElasticSpace) -> list[TrainedRouter]:
    """One of each checkpoint, all for the same cost table."""
    found = [TrainedRouter.read_all(folder, space)[0] for folder in folders]
    assert len({router.table.sha256 for router in found}) == 1, "the routers are for different cost tables"
    assert found[0].table.name in COUNTED, "equal costs need a counted cost"
    return found


def uniform(space: ElasticSpace, table: CostTable) -> dict[str, SubNetwork]:
    """By name, from cheap to dear; without the full network."""
    named = {f"mlp {mlp:.2f}, attention {attention:.2f}": sub for (mlp, attention), sub in uniform_pairs(space)}
    below = [(name, sub) for name, sub in named.items() if sub != space.full()]
    return dict(sorted(below, key=lambda item: table.cost(item[1])))


def searched(loaded: Loaded, surrogate: TrainedSurrogate, table: CostTable, cost: float, count: int) -> SubNetwork:
    """What evolution finds."""
    score, generator = on_surrogate_text(loaded, surrogate), torch.Generator().manual_seed(0)
    limit = Limit(table, cost, "")
    return evolution(loaded.backbone.space, [limit], score, count=count, generator=generator).sub_network


def without_router(surrogate: TrainedSurrogate, space: ElasticSpace, table: CostTable, cost: float) -> SubNetwork:
    """What decoding makes of the full network: the surrogate's own search, to see what a router adds to it."""
    start = torch.tensor([space.full().choices])
    bound = Bound(table, torch.tensor([cost], dtype=torch.float64))
    choices, _ = decode(space, start, [bound], surrogate.network)
    return SubNetwork(tuple(choices[0].tolist()))


def check_ladder(ladder: Ladder, table: CostTable, count: int = 1000) -> str:
    """Random budgets: each met, more never worse; and how long a selection takes."""
    smallest = table.smallest_ratio
    generator = torch.Generator().manual_seed(0)
    ratios = (smallest + (1 - smallest) * torch.rand(count, generator=generator, dtype=torch.float64)).sort().values
    limits = [ratio * table.full for ratio in ratios.tolist()]
    start = time.perf_counter()
    rungs = [ladder.at(limit) for limit in limits]
    seconds = (time.perf_counter() - start) / count
    assert all(table.cost(r.sub_network) <= limit for r, limit in zip(rungs, limits, strict=True))
    assert all(a.loss >= b.loss for a, b in pairwise(rungs))
    slack = mean(1 - rung.cost / limit for rung, limit in zip(rungs, limits, strict=True))
    return f"{count} budgets met, {slack:.2%} unused on average, monotone; a selection takes {seconds * 1e3:.4f} ms"


def figure(ratios: list[float], losses: dict[str, list[float]], name: str) -> Figure:
    """Loss against cost."""
    drawn = Figure(figsize=(7, 4.5), layout="constrained")
    axes = drawn.add_subplot()
    for label, values in losses.items():
        axes.plot(ratios[: len(values)], values, "o" if label == "uniform" else ".-", label=label)
    axes.set(xlabel=f"{name}, of the full network", ylabel="loss on test documents (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def compare(
    loaded: Loaded, surrogate: TrainedSurrogate, routers: list[TrainedRouter], *, count: int, budgets: int, tokens: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Cost ratios of the uniform sub-networks, and for each the losses by who answers; prints the table."""
    space, table = loaded.backbone.space, routers[0].table
    test = on_test_documents(loaded, tokens)
    named = [f"router {i}" for i in range(len(routers))]
    columns = ["uniform", *named, "no router", *(["evolution"] if count else [])]
    losses: dict[str, list[float]] = {column: [] for column in columns}
    shown = Table(title=f"loss on test documents at the {table.name} of uniform sub-networks, nats per token")
    for column in ("cost", "sub-network", *columns):
        shown.add_column(column, no_wrap=True)
    ratios = []
    for number, (name, sub_network) in enumerate(uniform(space, table).items()):
        cost = table.cost(sub_network)
        answers = [sub_network, *(router.ladder.at(cost).sub_network for router in routers)]
        answers.append(without_router(surrogate, space, table, cost))
        answers += [searched(loaded, surrogate, table, cost, count)] if count and number < budgets else []
        measured = [test(answer) for answer in answers]
        for column, loss in zip(columns, measured, strict=False):
            losses[column].append(loss)
        ratios.append(cost / table.full)
        shown.add_row(f"{ratios[-1]:.3f}", name, *(f"{loss:.3f}" for loss in measured))
    shown.add_row("", "mean", *(f"{mean(values):.3f}" for values in losses.values()))
    Console(width=140).print(shown)
    return ratios, losses


def verdict(losses: dict[str, list[float]], router: str, count: int) -> tuple[str, bool]:
    """One router's figures in a line, and whether they are within the limits."""
    margins = [u - o for u, o in zip(losses["uniform"], losses[router], strict=True)]
    wins = sum(margin > 0 for margin in margins)
    line = f"{router}: better than {wins} of {len(margins)} uniform, mean margin {mean(margins):.3f} nats"
    good = wins >= WINS and mean(margins) >= MARGIN
    if count:
        gaps = [o - e for o, e in zip(losses[router], losses["evolution"], strict=False)]
        gap = mean(gaps)
        line += f", {gap:+.3f} nats against evolution with {count} losses a budget ({len(gaps)} budgets)"
        good = good and gap <= GAP
    return line, good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--routers", type=Path, nargs="+", required=True, help="run folders of the static router stage")
    parser.add_argument("--count", type=int, default=0, help="losses that evolution measures a budget; 0 leaves it out")
    parser.add_argument("--budgets", type=int, default=11, help="evolution for so many of them, the cheapest first")
    parser.add_argument("--tokens", type=int, default=4096, help="test tokens of each domain")
    parser.add_argument("--figure", type=Path, default=None)
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure is beyond its limit")
    options = parser.parse_args()
    folders = flextron_folders(options.routers)
    loaded = load_elastic(str(folders[0]))
    routers = routers_of(folders, loaded.backbone.space)
    surrogate = TrainedSurrogate.read(folders[0], loaded.backbone.space)
    assert surrogate is not None
    ratios, losses = compare(
        loaded, surrogate, routers, count=options.count, budgets=options.budgets, tokens=options.tokens
    )
    print(f"{len(surrogate.pairs.select(held_out=False))} losses were measured for all budgets of a router together")
    verdicts = [verdict(losses, f"router {number}", options.count) for number in range(len(routers))]
    for (line, _), router in zip(verdicts, routers, strict=True):
        print(f"{line}\n  {check_ladder(router.ladder, router.table)}")
    if options.figure is not None:
        figure(ratios, losses, routers[0].table.name).savefig(options.figure, dpi=120)
    if options.check and not all(good for _, good in verdicts):
        sys.exit("beyond the limit")


if __name__ == "__main__":
    main()
