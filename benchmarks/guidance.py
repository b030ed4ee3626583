"""A router trained through the surrogate against one trained through the backbone, at equal wall time.

    python benchmarks/guidance.py --checkpoint runs/quickstart/elastic --output runs/guidance

The surrogate's time includes measuring its pairs, from an empty cache. Then the backbone gets as much time: the steps
that fit into it are found by timing a few. Answers to the costs of the uniform sub-networks are measured on test
documents: what the backbone's router chooses, whatever that costs, and what the surrogate's ladder has at that cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from held_out_text import on_test_documents
from routers import uniform

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.files.cache_folder import cache_root
from flextron_lit.routers.trained import TrainedRouter
from flextron_lit.space import SubNetwork

COMMON = ("-c", "configs/data/embedded.yaml", "-c", "configs/trainer/cpu.yaml")
ROUTER = ("-c", "configs/stages/static_router.yaml", *COMMON, "--model.init_args.cost", "flops")
BUDGETS_A_STEP = 2
LEARNING_RATE = 1e-2
"""Larger than through the surrogate, since there are far fewer steps."""


def fit(*arguments: object, cache: Path | None = None) -> float:
    """Seconds that `main.py fit` takes."""
    environment = os.environ | ({"FLEXTRON_CACHE": str(cache)} if cache else {})
    start = time.monotonic()
    subprocess.run([sys.executable, "main.py", "fit", *map(str, arguments)], cwd=ROOT, env=environment, check=True)
    return time.monotonic() - start


def with_surrogate(checkpoint: Path, output: Path) -> float:
    """Surrogate and router stage with an empty cache of losses; seconds."""
    with tempfile.TemporaryDirectory() as cache:
        # the tokens of the text are needed either way
        (Path(cache) / "tokens").symlink_to(cache_root() / "tokens")
        (Path(cache) / "wheels").symlink_to(cache_root() / "wheels")
        stage = ("-c", "configs/stages/surrogate.yaml", *COMMON, "--model.init_args.checkpoint", checkpoint)
        seconds = fit(*stage, "--run_folder", output / "surrogate", cache=Path(cache))
        guides = [
            {"class_path": "callbacks.BudgetSampling", "init_args": {"k": 64}},
            {"class_path": "callbacks.SurrogateGuidance"},
        ]
        router = (*ROUTER, "--model.init_args.checkpoint", output / "surrogate/flextron")
        callbacks = ("--trainer.callbacks", json.dumps(guides), "--trainer.limit_val_batches", 0)
        return seconds + fit(*router, *callbacks, "--run_folder", output / "guided", cache=Path(cache))


def through_backbone(output: Path, name: str, steps: int) -> float:
    """Router stage without a surrogate; seconds."""
    draws = json.dumps([{"class_path": "callbacks.BudgetSampling", "init_args": {"k": BUDGETS_A_STEP}}])
    return fit(
        *ROUTER,
        "--model.init_args.checkpoint",
        output / "surrogate/flextron",
        "--model.init_args.through_backbone",
        "true",
        "--model.init_args.optimizer",
        json.dumps({"class_path": "torch.optim.Adam", "init_args": {"lr": LEARNING_RATE}}),
        "--trainer.callbacks",
        draws,
        "--trainer.limit_val_batches",
        0,
        "--trainer.max_steps",
        steps,
        "--run_folder",
        output / name,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the elastic stage")
    parser.add_argument("--output", type=Path, required=True, help="an empty folder for the runs")
    parser.add_argument("--tokens", type=int, default=4096, help="test tokens of each domain")
    options = parser.parse_args()
    output = options.output.absolute()
    seconds = with_surrogate(options.checkpoint.absolute(), output)
    short, longer = (through_backbone(output, f"timing{steps}", steps) for steps in (2, 8))
    steps = max(1, round((seconds - short) / ((longer - short) / 6)) + 2)
    backbone_seconds = through_backbone(output, "backbone", steps)

    folder = output / "guided/flextron"
    loaded = load_elastic(str(folder))
    space = loaded.backbone.space
    (guided,) = TrainedRouter.read_all(folder, space)
    (unguided,) = TrainedRouter.read_all(output / "backbone/flextron", space)
    test, table = on_test_documents(loaded, options.tokens), guided.table
    budgets = [table.ratio(sub_network) for sub_network in uniform(space, table).values()]
    chosen = [SubNetwork(tuple(row)) for row in unguided.network(torch.tensor(budgets)).argmax(-1).tolist()]
    shown = Table(title="loss on test documents, nats per token")
    for column in (
        "budget",
        "cost of the backbone's router",
        "its loss",
        "loss of the surrogate's ladder at that cost",
    ):
        shown.add_column(column, justify="right")
    gains = []
    for budget, sub_network in zip(budgets, chosen, strict=True):
        losses = [test(sub_network), test(guided.ladder.at(table.cost(sub_network)).sub_network)]
        gains.append(losses[0] - losses[1])
        shown.add_row(f"{budget:.3f}", f"{table.ratio(sub_network):.3f}", *(f"{loss:.3f}" for loss in losses))
    Console(width=140).print(shown)
    print(f"with surrogate {seconds:.0f} s; through the backbone {backbone_seconds:.0f} s, {steps} steps of 512 tokens")
    wins = f"{sum(gain > 0 for gain in gains)} of {len(gains)}"
    print(f"the surrogate's router is better by {mean(gains):.3f} nats on average, at {wins} budgets")


if __name__ == "__main__":
    main()
