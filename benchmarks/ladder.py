"""One elastic network against a ladder of networks trained end to end ("7.63 % of the tokens"; ours, on small Llamas).

    OMP_NUM_THREADS=1 python benchmarks/ladder.py --work runs/ladder

Llamas of 1/4, 1/2, 3/4 of the largest one's neurons and heads, and the largest one, are each trained from nothing on as
many tokens of the same text. The largest one is converted in closed form and trained elastic on some share of those
tokens (all that its conversion reads, and every pass that learns); its sub-networks of the same widths, and the ones of
as many parameters that the excess losses answer, stand against the ladder's. So do those of a rival that is nested
from the start: the largest network, trained from nothing at widths drawn anew at every step (MatFormer), on as many
tokens as the largest one and its elastic training had together. Losses are those of test documents. What is in
`--results` is not measured again; `--quick` is a look whether all of it runs.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from kept_results import Kept
from small_llama import (
    BLOCK_SIZE,
    NETWORK,
    OnTestDocuments,
    OrderedText,
    by_excess,
    endless,
    fit,
    save,
    small_text,
    train,
    untrained,
)

from flextron_lit import callbacks
from flextron_lit.costs import parameter_table
from flextron_lit.costs.budget import Limit
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.measured_loss import mean_loss
from flextron_lit.stages import Calibration, Distillation, ElasticTraining

SIZES = (0.25, 0.5, 0.75, 1.0)
"""Of the largest network's neurons and heads."""
PAPER = 0.0763
"""Share of its pretraining that the paper's elastic training took."""
PARTS = (0.02, 0.04, PAPER, 0.15)
CALIBRATION = Calibration(tokens=4096, excess_tokens=2048)
K, STRATEGIES = 3, {"excess": 1.0, "uniform": 1.0}
"""Sub-networks of an elastic step: half of the steps train such as budgets get, half such as stand in the ladder."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """By what networks are trained."""

    tokens: int = 3_145_728
    """Of each end-to-end training."""
    batch_size: int = 8
    """Blocks of a step."""
    learning_rate: float = 1e-3
    elastic_batch_size: int = 4
    elastic_learning_rates: tuple[float, float] = (2e-3, 5e-4)
    """Of own projections alone, and of all weights."""
    test_tokens: int = 4096
    """Of each domain."""

    def steps(self, tokens: float) -> int:
        """Of training from nothing."""
        return int(tokens) // (self.batch_size * BLOCK_SIZE)

    def elastic_steps(self, tokens: float, passes: int) -> int:
        """Of elastic training, behind a conversion."""
        left = int(tokens) - CALIBRATION.tokens - CALIBRATION.excess_tokens
        steps = left // (passes * self.elastic_batch_size * BLOCK_SIZE)
        if steps < 1:
            raise ValueError(f"{tokens:.0f} tokens are too few: conversion alone reads {int(tokens) - left}")
        return steps


QUICK = Recipe(tokens=131_072, test_tokens=1024, elastic_batch_size=2)
WAYS = ("own projections", "all weights")


@dataclass(frozen=True)
class Seed:
    """One run of everything: first weights and order of the text."""

    number: int
    recipe: Recipe
    text: OrderedText
    folder: Path
    loss: OnTestDocuments

    @property
    def largest(self) -> Path:
        return self.folder / f"seed {self.number}"

    def end_to_end(self, size: float) -> Row:
        """A rung of the ladder."""
        begun, model = time.monotonic(), untrained(self.number, size)
        self.text.batch_size = self.recipe.batch_size
        train(model, endless(self.text), self.recipe.steps(self.recipe.tokens), self.recipe.learning_rate)
        seconds = time.monotonic() - begun
        if size == 1:
            save(model, self.text, self.largest)
        loss = mean_loss(model, self.loss.batches)
        return {"parameters": model.num_parameters(), "loss": loss, "seconds": seconds}

    def elastic(self, way: str, part: float) -> Row:
        """The largest network with all its parts, by so many tokens more."""
        begun, own = time.monotonic(), way == WAYS[0]
        passes = K if own else K + 1
        steps = self.recipe.elastic_steps(part * self.recipe.tokens, passes)
        rate = self.recipe.elastic_learning_rates[WAYS.index(way)]
        stage = ElasticTraining(
            str(self.largest),
            lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0),
            calibration=CALIBRATION,
            trained="compensation" if own else "all",
            distillation=Distillation(sampled_from_full=1.0),
        )
        sampling = callbacks.BudgetSampling(k=K, strategies=STRATEGIES, seed=self.number)
        fit(stage, self.text, self.recipe.elastic_batch_size, self.folder, sampling, max_steps=steps)
        seconds = time.monotonic() - begun
        read = CALIBRATION.tokens + CALIBRATION.excess_tokens
        tokens = read + steps * passes * self.recipe.elastic_batch_size * BLOCK_SIZE
        backbone, table = stage.backbone, parameter_table(stage.backbone)
        alike = {f"{size:g}": backbone.space.uniform(size, size) for size in SIZES}
        limits = {size: Limit(table, table.cost(each), f"as many as {size}") for size, each in alike.items()}
        answered = {size: by_excess(stage)(limit) for size, limit in limits.items()}
        # the full network is among both
        known = {each: self.loss(backbone, each) for each in {*alike.values(), *answered.values()}}
        return {
            "steps": steps,
            "tokens": tokens,
            "losses": {size: known[each] for size, each in alike.items()},
            "answered": {size: known[each] for size, each in answered.items()},
            "sub_networks": {size: each.to_json() for size, each in answered.items()},
            "seconds": seconds,
        }

    def nested(self, part: float) -> Row:
        """MatFormer's recipe."""
        begun, model = time.monotonic(), untrained(self.number)
        backbone, sizes = ElasticBackbone(model), random.Random(self.number)
        self.text.batch_size = self.recipe.batch_size
        steps = self.recipe.steps((1 + part) * self.recipe.tokens)

        def narrowed() -> Any:
            size = sizes.choice(SIZES)
            return backbone.use(backbone.space.uniform(size, size))

        train(model, endless(self.text), steps, self.recipe.learning_rate, narrowed)
        seconds = time.monotonic() - begun
        losses = {f"{size:g}": self.loss(backbone, backbone.space.uniform(size, size)) for size in SIZES}
        return {"tokens": steps * self.recipe.batch_size * BLOCK_SIZE, "losses": losses, "seconds": seconds}


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    recipe, parts, seeds = (QUICK, PARTS[2:], [0]) if options.quick else (Recipe(), PARTS, options.seeds)
    results = options.work / "quick.json" if options.quick else options.results
    work = options.work / "quick" if options.quick else options.work
    settings = {**vars(recipe), "calibration": vars(CALIBRATION), "k": K, "strategies": STRATEGIES}
    kept = Kept(results, {**settings, "network": NETWORK})
    text = small_text(options.work, recipe.test_tokens)
    loss = OnTestDocuments.of(text)
    for number in seeds:
        text.order = number
        seed = Seed(number, recipe, text, work, loss)
        for size in SIZES:
            kept.keep("end to end", f"{size:g}, seed {number}", partial(seed.end_to_end, size))
        for way in WAYS:
            for part in parts:
                kept.keep(way, f"{part:g}, seed {number}", partial(seed.elastic, way, part))
        kept.keep("nested", f"{PAPER:g}, seed {number}", partial(seed.nested, PAPER))


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="where the tokenizer and the largest networks are kept")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/ladder.json"))
    made.add_argument("--quick", action="store_true", help="one seed, few tokens; results stay in --work")
    return made.parse_args()


if __name__ == "__main__":
    main()
