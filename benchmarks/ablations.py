"""What each part of the workflow is worth: short runs on a small Llama that differ from a base in one thing (ours).

    OMP_NUM_THREADS=1 python benchmarks/ladder.py --work runs/ladder
    OMP_NUM_THREADS=1 python benchmarks/ablations.py --work runs/ladder

The network is the largest of the ladder's seed 0. The base is elastic training as the quickstart has it, but for text
that the network writes itself: own projections alone learn, half of what they learn from is the full network. Losses
are those of test documents at 0.9, 0.75, 0.6, 0.45 of the elastic blocks' parameters, by what the excess losses answer;
seeds choose sub-networks and order of the text. What is in `--results` is not measured again; `--quick` is a look
whether all of it runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from kept_results import Kept
from small_llama import (
    BLOCK_SIZE,
    NETWORK,
    OnTestDocuments,
    OrderedText,
    answer,
    by_excess,
    fit,
    of_blocks,
    small_text,
)

from flextron_lit import callbacks, checkpoint
from flextron_lit.costs import parameter_table
from flextron_lit.costs.budget import Limit
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.routers.from_budget import Routing
from flextron_lit.routers.from_surrogate import train_router
from flextron_lit.routers.ladder import Ladder, candidates, measured_ladder, worth_measuring
from flextron_lit.routers.trained import TrainedRouter
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages import (
    Calibration,
    Distillation,
    ElasticTraining,
    JointTuning,
    Remeasuring,
    Stage,
    SurrogateTraining,
)

SHARES = (0.9, 0.75, 0.6, 0.45)
"""Of the elastic blocks' parameters."""
BATCH_SIZE, K = 4, 3
LEARNING_RATES = {"compensation": 2e-3, "all": 5e-4}
"""By what is trained; those of ladder.py."""
TUNING_LEARNING_RATE = 4e-4
"""Of joint tuning, and of as many elastic steps: a fifth, as in the quickstart."""
CALIBRATION = Calibration(tokens=4096, excess_tokens=2048)
REMEASURING = Remeasuring(candidates=12, tokens=1024, block_size=BLOCK_SIZE)
FROM_FULL = Distillation(sampled_from_full=1.0)
BASE = "base"
ORDERS = ("magnitude", "outgoing")
"""That go with every reconstruction."""
ALL = "all weights trained"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Elastic training that differs from the base in what is given."""

    calibration: Calibration = CALIBRATION
    space: SpaceConfig | None = None
    strategies: dict[str, float] = field(default_factory=lambda: {"excess": 1.0})
    distillation: Distillation = FROM_FULL
    trained: str = "compensation"

    def __call__(self, **settings: Any) -> Case:
        return replace(self, **settings)

    def ordered(self, importance: str, compensation: str) -> Case:
        """With units in another order, and something else that makes up for those left out."""
        return self(calibration=replace(self.calibration, importance=importance, compensation=compensation))


OWN, WHOLE = Case(), Case(trained="all")
CASES: dict[str, dict[str, Case]] = {
    BASE: {"greedy, own": OWN},
    "order and reconstruction": {
        f"{order}, {form}": OWN.ordered(order, form) for order in ORDERS for form in ("scales", "own")
    },
    ALL: {
        "greedy, own": WHOLE,
        **{f"{order}, {form}": WHOLE.ordered(order, form) for order in ORDERS for form in ("none", "scales", "own")},
    },
    "sampling": {
        "uniform": OWN(strategies={"uniform": 1.0}),
        "independent": OWN(strategies={"independent": 1.0}),
        "three of four independent, one uniform": OWN(strategies={"independent": 0.75, "uniform": 0.25}),
        "stratified": OWN(strategies={"stratified": 1.0}),
        "sandwich": OWN(strategies={"sandwich": 1.0}),
    },
    "distillation": {
        "none": OWN(distillation=Distillation()),
        "alone": OWN(distillation=Distillation(sampled_from_full=1.0, language=0.0)),
    },
    f"distillation, {ALL}": {
        "none": WHOLE(distillation=Distillation()),
        "from the original": WHOLE(distillation=Distillation(sampled_from_original=1.0)),
        "from the full network, which is held to the original": WHOLE(
            distillation=Distillation(sampled_from_full=1.0, full_from_original=1.0)
        ),
    },
    "widths": {
        "8 of each MLP": OWN(space=SpaceConfig(mlp=[each / 8 for each in range(1, 9)])),
        "MLPs alone": OWN(space=SpaceConfig(attention=[1.0])),
    },
}
"""By group; the base stands before each."""
SURROGATES = {
    "surrogate, 40 pairs": (40, "log_excess"),
    "surrogate, 40 pairs, raw loss": (40, "loss"),
    "surrogate, 200 pairs": (200, "log_excess"),
    "surrogate, 200 pairs, raw loss": (200, "loss"),
}
"""Pairs, and what is predicted of them."""
ANSWERS, TUNING = "answers", "joint tuning"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How long things take."""

    steps: int = 40
    tuning_steps: int = 12
    pairs_tokens: int = 1024
    surrogate_steps: int = 400
    router_steps: int = 400
    test_tokens: int = 4096
    """Of each domain."""


QUICK = Recipe(steps=3, tuning_steps=2, pairs_tokens=256, surrogate_steps=10, router_steps=10, test_tokens=512)


class Before(Callback):
    """What conversion alone gives."""

    losses: dict[str, float]

    def __init__(self, losses: Callable[[Stage], dict[str, float]]) -> None:
        self.measure = losses

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.losses = self.measure(pl_module)
        pl_module.train()


def by_ladder(ladder: Ladder | None) -> Callable[[Limit], SubNetwork]:
    assert ladder is not None
    return lambda limit: ladder.at(limit.value).sub_network


@dataclass(frozen=True)
class Bench:
    """The network, its text, and one seed."""

    start: str
    recipe: Recipe
    seed: int
    text: OrderedText
    folder: Path
    loss: OnTestDocuments

    def at_all(self, backbone: ElasticBackbone, answered: Callable[[Limit], SubNetwork]) -> dict[str, float]:
        """Losses by share of the parameters."""
        limits = {f"{share:g}": of_blocks(backbone, share) for share in SHARES}
        return {share: self.loss(backbone, answered(limit)) for share, limit in limits.items()}

    def optimizer(self, rate: float) -> Callable[[Any], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def sampling(self, strategies: dict[str, float] | None) -> Callback:
        return callbacks.BudgetSampling(k=K, strategies=strategies, seed=self.seed)

    def run(self, case: Case, *others: Callback, folder: Path | None = None) -> Row:
        """Convert and train."""
        begun = time.monotonic()
        settings = {name: value for name, value in vars(case).items() if name != "strategies"}
        stage = ElasticTraining(self.start, self.optimizer(LEARNING_RATES[case.trained]), **settings)
        before = Before(lambda stage: self.at_all(stage.backbone, by_excess(stage)))
        each = [self.sampling(case.strategies), *others, *([] if self.seed else [before])]
        fit(stage, self.text, BATCH_SIZE, folder or self.folder, *each, max_steps=self.recipe.steps)
        row = {"losses": self.at_all(stage.backbone, by_excess(stage)), "full": self.loss(stage.backbone)}
        return {**row, **({} if self.seed else {"before": before.losses}), "seconds": time.monotonic() - begun}

    # --- what follows the elastic stage ---------------------------------------------------------------------------

    @property
    def elastic(self) -> Path:
        """The base's checkpoint."""
        return self.folder / "elastic" / "flextron"

    def surrogate(self, pairs: int, target: str) -> SurrogateTraining:
        """Of the base's network."""
        how = {"tokens": self.recipe.pairs_tokens, "block_size": BLOCK_SIZE, "target": target, "seed": self.seed}
        stage = SurrogateTraining(str(self.elastic), pairs=pairs, held_out=12, **how)
        fit(stage, self.text, BATCH_SIZE, self.folder, max_steps=self.recipe.surrogate_steps)
        return stage

    def by_surrogate(self, pairs: int, target: str) -> Row:
        stage = self.surrogate(pairs, target)
        backbone = stage.backbone
        routing = Routing(backbone.space, {"parameters": parameter_table(backbone)}, {}, stage.trained, stage.excess)
        return {"losses": self.at_all(backbone, partial(answer, routing)), "quality": stage.metrics()}

    def tuned(self) -> dict[str, Row]:
        """A router alone, tuned jointly with its network, and its network trained on for as many steps."""
        stage = self.surrogate(*SURROGATES["surrogate, 40 pairs"])
        router = train_router(
            stage.backbone.space,
            parameter_table(stage.backbone),
            replace(stage.trained, settings=stage.settings()),
            steps=self.recipe.router_steps,
            seed=self.seed,
        )
        routed = self.folder / "routed"
        checkpoint.extend(self.elastic, routed, files=stage.files() | router.files())
        found = {"router alone": self.at_all(stage.backbone, by_ladder(router.ladder))}

        how = {"trained": "compensation", "distillation": FROM_FULL}
        optimizer, steps = self.optimizer(TUNING_LEARNING_RATE), self.recipe.tuning_steps
        how_routed = {"train_router": False, "remeasuring": REMEASURING, "seed": self.seed, **how}
        for draws in ("router", "ladder"):
            joint = JointTuning(str(routed), optimizer, draws=draws, **how_routed)
            fit(joint, self.text, BATCH_SIZE, self.folder, self.sampling(None), max_steps=steps)
            found[f"joint tuning, draws of the {draws}"] = self.at_all(joint.backbone, by_ladder(joint.ladder))

        continued = ElasticTraining(str(routed), optimizer, **how)
        fit(continued, self.text, BATCH_SIZE, self.folder, self.sampling({"excess": 1.0}), max_steps=steps)
        again = self.measured_again(continued, router)
        found["as many elastic steps"] = self.at_all(continued.backbone, by_ladder(again))
        return {name: {"losses": losses} for name, losses in found.items()}

    def measured_again(self, stage: ElasticTraining, router: TrainedRouter) -> Ladder:
        """The router's answers by what a network that was trained on loses, as joint tuning measures them."""
        how = {"block_size": REMEASURING.block_size, "batch_size": REMEASURING.batch_size}
        backbone = stage.backbone
        losses = MeasuredLoss(backbone, self.text.calibration_batches(REMEASURING.tokens, **how))
        series = candidates(router.network, backbone.space, router.table, router.ladder, stage.excess)
        chosen = worth_measuring(series, REMEASURING.candidates)
        backbone.model.eval()
        return measured_ladder(router.table, series, {each: losses(each) for each in chosen})


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    recipe, seeds = (QUICK, [0]) if options.quick else (Recipe(), options.seeds)
    results = options.work / "quick_ablations.json" if options.quick else options.results
    start = options.work / ("quick/seed 0" if options.quick else "seed 0")
    settings = {**asdict(recipe), "batch_size": BATCH_SIZE, "k": K, "learning_rates": LEARNING_RATES}
    kept = Kept(results, {**settings, "calibration": asdict(CALIBRATION), "network": NETWORK})
    text = small_text(options.work, recipe.test_tokens)
    loss = OnTestDocuments.of(text)
    for seed in seeds:
        text.order = seed
        folder = options.work / ("quick" if options.quick else "ablations") / f"elastic seed {seed}"
        of_seed(kept, Bench(str(start), recipe, seed, text, folder, loss))


def of_seed(kept: Kept, bench: Bench) -> None:
    """All that is not known of a seed, the base first: what follows starts from its checkpoint."""
    for group, cases in CASES.items():
        for name, case in cases.items():
            others = [callbacks.FlextronCheckpointWriter()] if group == BASE else []
            run = partial(bench.run, case, *others, folder=bench.elastic.parent if group == BASE else None)
            kept.keep(group, f"{name}, seed {bench.seed}", run)
    for name, (pairs, target) in SURROGATES.items():
        kept.keep(ANSWERS, f"{name}, seed {bench.seed}", partial(bench.by_surrogate, pairs, target))
    kept.keep(TUNING, f"seed {bench.seed}", bench.tuned)


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--work", type=Path, required=True, help="that of ladder.py, which holds the network")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/ablations.json"))
    made.add_argument("--quick", action="store_true", help="one seed, few steps; results stay in --work")
    return made.parse_args()


if __name__ == "__main__":
    main()
