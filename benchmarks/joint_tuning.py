"""Joint tuning of network and static router against continued elastic training for as many tokens, on test documents.

    OMP_NUM_THREADS=1 python benchmarks/joint_tuning.py --start runs/router0 runs/router1 \
      --joint runs/joint0 runs/joint1 --continued runs/continued0 runs/continued1 --check

The runs of a seed have the same place in the three lists; joint tuning and continued training began with the weights of
its start. Both end with a ladder that is measured anew from the start's, as the joint tuning stage does, so that what
measuring alone brings is told apart; `continued` has the start's ladder as it was. Costs are ratios to the full
network's.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from held_out_text import flextron_folders, measured_on, on_test_documents

from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.data import TextDataModule
from flextron_lit.routers.ladder import Ladder, candidates, measured_ladder, worth_measuring
from flextron_lit.routers.trained import TrainedRouter
from flextron_lit.stages.tuned_router import Remeasuring

FULL_LIMIT = 0.02
ARMS = ("start", "joint", "continued", "continued, re-measured")


@dataclass(frozen=True)
class Row:
    """What one set of weights loses with one ladder: full, then one loss a budget."""

    full: float
    routed: list[float]
    costs: list[float]

    def cells(self) -> list[str]:
        return [f"{loss:.3f} ({cost:.3f})" for loss, cost in zip(self.routed, self.costs, strict=True)]


def router_of(loaded: Loaded) -> TrainedRouter:
    (router,) = TrainedRouter.read_all(loaded.folder, loaded.backbone.space)
    return router


def row(loaded: Loaded, ladder: Ladder, router: TrainedRouter, budgets: list[float], tokens: int) -> Row:
    """Losses on test documents."""
    measured = on_test_documents(loaded, tokens)
    rungs = [ladder.at(budget * router.table.full) for budget in budgets]
    costs = [rung.cost / router.table.full for rung in rungs]
    return Row(measured(loaded.backbone.space.full()), [measured(rung.sub_network) for rung in rungs], costs)


def measured_again(loaded: Loaded, router: TrainedRouter, earlier: Ladder) -> Ladder:
    """The ladder that measuring makes of a router, an earlier ladder and the network as it is."""
    settings = Remeasuring()
    assert loaded.text is not None
    data = TextDataModule.from_description(loaded.text, tokenizer=str(loaded.folder))
    data.prepare_data()
    shape = {"block_size": settings.block_size, "batch_size": settings.batch_size}
    batches = data.calibration_batches(settings.tokens, **shape)
    series = candidates(router.network, loaded.backbone.space, router.table, earlier, loaded.excess)
    losses = measured_on(loaded, batches)
    return measured_ladder(router.table, series, {s: losses(s) for s in worth_measuring(series, settings.candidates)})


def compared(start: Path, joint: Path, continued: Path, budgets: list[float], tokens: int) -> dict[str, Row]:
    """One seed's rows by arm."""
    before = load_elastic(str(start))
    router = router_of(before)
    found = {"start": row(before, router.ladder, router, budgets, tokens)}
    tuned = load_elastic(str(joint))
    found["joint"] = row(tuned, measured_again(tuned, router_of(tuned), router.ladder), router, budgets, tokens)
    trained = load_elastic(str(continued))
    found["continued"] = row(trained, router.ladder, router, budgets, tokens)
    found["continued, re-measured"] = row(
        trained, measured_again(trained, router, router.ladder), router, budgets, tokens
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("start", "joint", "continued"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True, help="run folders, one a seed")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6])
    parser.add_argument("--tokens", type=int, default=4096, help="test tokens of each domain")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if joint tuning is behind, or costs the full network"
    )
    options = parser.parse_args()
    runs = [flextron_folders(folders) for folders in (options.start, options.joint, options.continued)]
    bad = []
    shown = Table(title="loss on test documents, nats per token")
    for column in ("seed", "weights and ladder", "full", *(f"{budget:g}" for budget in options.budgets)):
        shown.add_column(column, no_wrap=True)
    rows: dict[str, list[Row]] = {arm: [] for arm in ARMS}
    for seed, folders in enumerate(zip(*runs, strict=True)):
        found = compared(*folders, options.budgets, options.tokens)
        for arm in ARMS:
            rows[arm].append(found[arm])
            shown.add_row(str(seed), arm, f"{found[arm].full:.3f}", *found[arm].cells())
        both = zip(found["continued"].routed, found["continued, re-measured"].routed, strict=True)
        against = [min(losses) for losses in both]
        bad += [f"seed {seed}"] * any(o >= t for o, t in zip(found["joint"].routed, against, strict=True))
        bad += [f"full, seed {seed}"] * (found["joint"].full > found["start"].full + FULL_LIMIT)
    for arm in ARMS:
        columns = zip(*([one.full, *one.routed] for one in rows[arm]), strict=True)
        shown.add_row("mean", arm, *(f"{mean(each):.3f}" for each in columns))
    Console(width=140).print(shown)
    if options.check and bad:
        sys.exit(f"beyond the limit: {', '.join(bad)}")


if __name__ == "__main__":
    main()
