"""Dynamic routers against static ones at equal mean cost, on test documents and on text that nobody trained on.

    python benchmarks/dynamic_routers.py --checkpoint runs/quickstart/dynamic_router --text wikitext2_raw_test.txt

For each budget the dynamic router runs first; the static network is the one of its checkpoint's ladder whose cost is
nearest to the mean cost that the dynamic router had over all domains. Both costs are ratios of the same full network's.
Differences come with 95 % intervals of a paired bootstrap over documents (over blocks for a text file).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from held_out_text import flextron_folders, test_text
from text_loss import blocks_of

from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.evaluation.bootstrap_intervals import interval
from flextron_lit.evaluation.document_losses import Batch, document_losses, pooled
from flextron_lit.routers.dynamic import mean_ratio
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter

losses_of = partial(document_losses, forward_context=partial(torch.autocast, "cpu", torch.bfloat16))


def compared(
    loaded: Loaded, dynamic: TrainedDynamicRouter, static: TrainedRouter, budget: float, texts: dict[str, list[Batch]]
) -> Iterator[list[str]]:
    """A row a text, and one over all domains; texts that are no domain (named in brackets) do not count in that."""
    backbone = loaded.backbone
    policy = dynamic.policy([budget])
    ours, costs, counts = {}, {}, {}
    for name, batches in texts.items():
        ours[name] = losses_of(backbone, policy, batches, f"dynamic {budget:g}, {name}")
        counts[name] = policy.take()
        costs[name] = mean_ratio(counts[name], dynamic.table)
    domains = [name for name in texts if not name.startswith("(")]
    overall = mean_ratio(torch.stack([counts[name] for name in domains]).sum(0), dynamic.table)
    rung = min(static.ladder.rungs, key=lambda rung: abs(rung.cost / static.table.full - overall))
    theirs = {n: losses_of(backbone, rung.sub_network, b, f"static {budget:g}, {n}") for n, b in texts.items()}
    ours["all domains"] = pooled([ours[name] for name in domains])
    theirs["all domains"] = pooled([theirs[name] for name in domains])
    costs["all domains"] = overall
    for name in (*domains, "all domains", *(name for name in texts if name not in domains)):
        paired = ours[name] - theirs[name]
        low, high = interval(paired) or (float("nan"), float("nan"))
        yield [
            f"{budget:g}",
            name,
            f"{costs[name]:.3f} ({costs[name] / budget - 1:+.1%})",
            f"{rung.cost / static.table.full:.3f}",
            f"{ours[name].mean:.3f}",
            f"{theirs[name].mean:.3f}",
            f"{paired.mean:+.3f} [{low:+.3f}, {high:+.3f}]",
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True, help="of the dynamic router stage")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6])
    parser.add_argument("--cost", default="flops")
    parser.add_argument("--tokens", type=int, default=8192, help="test tokens of each domain")
    parser.add_argument("--text", type=Path, help="a text file that nobody trained on")
    options = parser.parse_args()
    for folder in flextron_folders(options.checkpoint):
        loaded = load_elastic(str(folder))
        loaded.backbone.model.eval()
        space = loaded.backbone.space
        dynamic = next(r for r in TrainedDynamicRouter.read_all(folder, space) if r.table.name == options.cost)
        static = next(r for r in TrainedRouter.read_all(folder, space) if r.table.name == options.cost)
        texts = dict(test_text(loaded, options.tokens))
        if options.text:
            blocks = blocks_of(options.text, str(folder), tokens=options.tokens, block_size=512)
            texts[f"({options.text.name})"] = [{"input_ids": b[None], "labels": b[None]} for b in blocks]
        shown = Table(title=f"{folder}: {options.cost}, {options.tokens} tokens a domain, nats per token")
        for column in ("budget", "text", "dynamic cost", "static cost", "dynamic", "static", "difference [95 %]"):
            shown.add_column(column, justify="left" if column == "text" else "right", no_wrap=True)
        for budget in options.budgets:
            for row in compared(loaded, dynamic, static, budget, texts):
                shown.add_row(*row)
        Console(width=140).print(shown)


if __name__ == "__main__":
    main()
