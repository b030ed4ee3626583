"""How well a surrogate predicts, against the number of pairs that it learned from.

    python main.py fit -c configs/stages/surrogate.yaml -c configs/data/embedded.yaml -c configs/trainer/cpu.yaml \
      --model.init_args.checkpoint runs/quickstart/elastic/flextron --model.init_args.pairs 400 \
      --model.init_args.held_out 80 --model.init_args.cost flops --run_folder runs/surrogate400
    python benchmarks/surrogate.py --checkpoint runs/surrogate400 --check

Every row trains a fresh surrogate, as the stage does, on the first pairs of the checkpoint and checks it on the
held-out ones, for both targets; the ridge fit is the additive baseline.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from held_out_text import flextron_folders

from flextron_lit import checkpoint
from flextron_lit.routers.pairs import Pairs
from flextron_lit.routers.surrogate import TARGETS, Surrogate, Target, ridge
from flextron_lit.routers.trained import TrainedSurrogate
from flextron_lit.space import ElasticSpace
from flextron_lit.stages.surrogate_training import quality

COUNTS = (50, 100, 200, 300, 400)
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 200, 32, 3e-3, 1.0
RANK_LIMIT, ERROR_LIMIT = 0.97, 0.12


def train(space: ElasticSpace, pairs: Pairs, targets: torch.Tensor, seed: int) -> Surrogate:
    """As the stage does."""
    generator = torch.Generator().manual_seed(seed)
    network = Surrogate(space, 64, generator)
    one_hot = pairs.one_hot(space)
    network.start(one_hot, targets)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(pairs), generator=generator).split(BATCH):
            optimizer.zero_grad()
            network.error(one_hot[chosen], targets[chosen]).backward()
            optimizer.step()
    return network


def row(space: ElasticSpace, found: TrainedSurrogate, count: int, target: Target, seeds: int) -> list[dict[str, float]]:
    """Figures of the ridge fit, then those of the surrogate, the mean over seeds."""
    learned, checked = (found.pairs.select(held_out=held_out) for held_out in (False, True))
    first = Pairs(learned.choices[:count], learned.losses[:count], learned.held_out[:count])
    trained = dataclasses.replace(found, target=target)
    targets, one_hot = trained.targets(first.losses), checked.one_hot(space)
    weight, bias = ridge(first.one_hot(space).flatten(1), targets)
    by_ridge = quality(trained.to_nats(one_hot.flatten(1) @ weight + bias), checked.losses)
    each = []
    for seed in range(seeds):
        network = train(space, first, targets, seed)
        with torch.no_grad():
            each.append(quality(trained.to_nats(network(one_hot)), checked.losses))
    return [by_ridge, {name: mean(figures[name] for figures in each) for name in by_ridge}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the surrogate stage")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit 1 if the last row is beyond its limits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (folder,) = flextron_folders([options.checkpoint])
    space = checkpoint.read(folder).space
    found = TrainedSurrogate.read(folder, space)
    assert found is not None, f"{folder} holds no surrogate"
    held_out = found.pairs.select(held_out=True)
    shown = Table(title=f"{len(held_out)} held-out sub-networks, standard deviation {held_out.losses.std():.3f} nats")
    for column in ("pairs", "target", "rank: ridge", "rank: surrogate", "error: ridge", "error: surrogate"):
        shown.add_column(column, no_wrap=True)
    available = len(found.pairs) - len(held_out)
    for target in TARGETS:
        for count in [count for count in COUNTS if count <= available]:
            by_ridge, by_surrogate = row(space, found, count, target, options.seeds)
            ranks = [f"{figures['rank_correlation']:.4f}" for figures in (by_ridge, by_surrogate)]
            errors = [f"{figures['error_over_std']:.1%}" for figures in (by_ridge, by_surrogate)]
            shown.add_row(str(count), target, *ranks, *errors)
            if target == found.target:
                last = by_surrogate, by_ridge
    Console(width=120).print(shown, "errors are mean absolute ones, of the standard deviation of the held-out losses")
    ours, baseline = last
    good = ours["rank_correlation"] >= RANK_LIMIT and ours["error_over_std"] <= ERROR_LIMIT
    if options.check and not (good and ours["error_over_std"] < baseline["error_over_std"]):
        sys.exit("beyond the limit")


if __name__ == "__main__":
    main()
