"""Predicted against measured latency of trained dynamic routers on real text, and of mixtures of widths.

    OMP_NUM_THREADS=1 python benchmarks/dynamic_latency.py --checkpoint runs/dynamic_router --budgets 0.8 0.7 0.6

Measures a dynamic latency table (`profile --dynamic` measures the same), then times the routers of the checkpoints on
test documents: what a router chose there goes through the table, and is compared with the time that it took. All times
are ratios to those of the full network run statically, measured between two runs of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from held_out_text import flextron_folders, test_text

from flextron_lit.checkpoint.in_memory import Loaded, load_elastic
from flextron_lit.costs import CostTable, Workload
from flextron_lit.costs.workload import Phase
from flextron_lit.latency.block_times import Passes, measuring
from flextron_lit.latency.device import device_description
from flextron_lit.latency.latency_table import LatencyTable
from flextron_lit.latency.routed_times import profile_dynamic
from flextron_lit.latency.timing import interleaved, seconds
from flextron_lit.routers.dynamic import DynamicPolicy, mean_ratio
from flextron_lit.routers.trained import TrainedDynamicRouter
from flextron_lit.terminal.progress import progress

LIMIT = 0.08
CONSTANT = 0.98
"""Share of a block's tokens from which on they are said to choose alike."""


def texts(loaded: Loaded, tokens: int, number: int) -> list[Tensor]:
    """The first tokens of test blocks, turn and turn about from each domain."""
    domains = [[batch["input_ids"][:, :tokens] for batch in batches] for _, batches in test_text(loaded, 4096)]
    found = [blocks[index] for index in range(number) for blocks in domains if index < len(blocks)]
    assert all(block.shape[1] == tokens for block in found), f"blocks of the test text hold less than {tokens} tokens"
    return found[:number]


def rows(
    loaded: Loaded, table: LatencyTable, budgets: list[float], phase: Phase, number: int, rounds: int
) -> Iterator[tuple[float, float, float, float]]:
    """Budget, share of the blocks whose tokens choose alike, predicted and measured ratio."""
    costs: CostTable = table.phases[phase].table
    (router, *_) = TrainedDynamicRouter.read_all(loaded.folder, loaded.backbone.space)
    workload, device = table.workload, loaded.backbone.model.device
    sample = texts(loaded, workload.total_tokens, number)
    policies: dict[tuple[float, int], DynamicPolicy] = {
        (budget, index): router.policy([budget]) for budget in budgets for index in range(len(sample))
    }
    with measuring(loaded.backbone, workload):
        runs = {
            (budget, index): getattr(Passes(loaded.backbone, policy, workload, sample[index]), phase)
            for (budget, index), policy in policies.items()
        }
        full = loaded.backbone.space.full()
        reference = getattr(Passes(loaded.backbone, full, workload, sample[0]), phase)
        turns = progress(range(rounds), f"{phase} of {loaded.folder.parent.name}")
        times = interleaved(runs, reference, turns, lambda run: seconds(run, device)).ratios
        counts = {name: policy.take() for name, policy in policies.items()}
    for name, ratio in times.items():
        shares = counts[name] / counts[name].sum(-1, keepdim=True)
        alike = float((shares.max(-1).values >= CONSTANT).double().mean())
        yield name[0], alike, mean_ratio(counts[name], costs), ratio.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", required=True, help="of the dynamic router stage")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.8, 0.7, 0.6])
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[256, 480])
    parser.add_argument("--generated_tokens", type=int, default=16)
    parser.add_argument("--held_out", type=int, default=24, help="mixtures to check the table on")
    parser.add_argument("--seconds", type=float, default=90, help="for a table; its check takes as long again")
    parser.add_argument("--texts", type=int, default=4, help="documents a budget")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="exit 1 if a prediction is off by more than 8 %%")
    options = parser.parse_args()
    folders = flextron_folders(options.checkpoint)
    beyond = 0
    shown = Table(title=f"predicted against measured, ratios to the full network, {torch.get_num_threads()} thread(s)")
    for column in ("router", "prompt", "phase", "budget", "blocks alike", "predicted", "measured", "error"):
        shown.add_column(column, no_wrap=True)
    checked = Table(title="the tables' own checks on mixtures of widths")
    for column in ("prompt", "phase", "mean error", "worst"):
        checked.add_column(column, no_wrap=True)
    for prompt in options.prompt_tokens:
        workload = Workload(
            prompt_tokens=prompt, generated_tokens=options.generated_tokens, threads=torch.get_num_threads()
        )
        tables: LatencyTable | None = None
        for folder in folders:
            loaded = load_elastic(str(folder))
            if tables is None:
                tables = profile_dynamic(
                    loaded.backbone, workload, budget_seconds=options.seconds, held_out=options.held_out
                )
                for name, phase in tables.phases.items():
                    errors = [abs(row.predicted / row.measured - 1) for row in phase.held_out]
                    checked.add_row(str(prompt), name, f"{phase.error:.1%}", f"{max(errors):.1%}")
            for name in tables.phases:
                found = rows(loaded, tables, options.budgets, name, options.texts, options.rounds)
                for budget, alike, predicted, measured in found:
                    error = predicted / measured - 1
                    beyond += abs(error) > LIMIT
                    numbers = f"{alike:.0%}", f"{predicted:.3f}", f"{measured:.3f}", f"{error:+.1%}"
                    shown.add_row(folder.parent.name, str(prompt), name, f"{budget:g}", *numbers)
    Console(width=140).print(checked)
    Console(width=140).print(shown)
    print(f"{device_description(torch.device('cpu'))['name']}, torch {torch.__version__}")
    if options.check and beyond:
        sys.exit(f"{beyond} predictions are off by more than {LIMIT:.0%}")


if __name__ == "__main__":
    main()
