"""Predicted against measured latency of sub-networks that the table was not made from, and of budgets that were met.

    python benchmarks/latency.py --figure latency.png
    python benchmarks/latency.py --device cuda --dtype bfloat16 --shape llama-2-7b --seconds 20
    sh benchmarks/gpu_budgets.sh

The weights are random: speed does not depend on their values. Sub-networks differ from
layer to layer and are spread evenly over cost. Times are ratios to the full network's, measured between two runs of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from shapes import SHAPES, SMOLLM2

from flextron_lit.checkpoint.in_memory import blank_elastic
from flextron_lit.costs import Workload
from flextron_lit.costs.budget import Limit
from flextron_lit.costs.workload import Dtype
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.latency.block_times import measure, profile
from flextron_lit.latency.device import device_description
from flextron_lit.latency.latency_table import HeldOut, LatencyTable
from flextron_lit.routers.search import fit
from flextron_lit.space import SpaceConfig, resolve

TARGETS = (0.9, 0.8, 0.7, 0.6)
ERROR_LIMIT, TARGET_LIMIT, RANK_LIMIT, SHARE_OF_CONSTANT = 0.04, 0.06, 0.98, 0.25


def blank(shape: str, dtype: torch.dtype, device: str, *, quarters: bool = False) -> ElasticBackbone:
    """A network of a known shape, on a device."""
    config = LlamaConfig(**SHAPES[shape])
    config._attn_implementation = "sdpa"
    layers, neurons, groups = config.num_hidden_layers, config.intermediate_size, config.num_key_value_heads
    # every count of groups, or quarters where there are many
    attention = [groups * quarter // 4 for quarter in (1, 2, 3, 4)] if quarters and groups >= 4 else None
    config_space = SpaceConfig() if attention is None else SpaceConfig(attention=attention)
    space = resolve(config_space, num_layers=layers, neurons=neurons, kv_groups=groups)
    return blank_elastic(config, space, dtype=dtype, device=device)


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, for values without ties."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (one, other)])
    return torch.corrcoef(ranks)[0, 1].item()


def error_of(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Mean absolute error, relative to what was measured."""
    return mean(abs(p - m) / m for p, m in zip(predicted, measured, strict=True))


def check(rows: Sequence[HeldOut]) -> dict[str, float]:
    """What the predictions are worth."""
    predicted, measured = [row.predicted for row in rows], [row.measured for row in rows]
    return {
        "error": error_of(predicted, measured),
        "error of the constant mean": error_of([mean(measured)] * len(measured), measured),
        "rank correlation": rank_correlation(predicted, measured),
    }


def targets(
    backbone: ElasticBackbone, table: LatencyTable, seconds: float, wanted: Sequence[float]
) -> list[tuple[str, float, float, float]]:
    """Phase, target, predicted and measured ratio of sub-networks that a search fitted to targets it could reach."""
    generator = torch.Generator().manual_seed(1)
    space, found = backbone.space, []
    for phase in table.phases:
        costs = table.phases[phase].table
        chosen = {}
        for target in wanted:
            fitted = fit(space, space.random(generator), [Limit(costs, target * costs.full, str(target))], generator)
            if fitted is not None:
                chosen[target] = fitted
        if not chosen:
            continue
        measured = measure(backbone, table.workload, phase, chosen, seconds).ratios
        found += [(phase, target, costs.ratio(sub), measured[target].value) for target, sub in chosen.items()]
    return found


def figure(table: LatencyTable) -> Figure:
    """Predicted against measured, a panel a phase."""
    drawn = Figure(figsize=(4.5 * len(table.phases), 4.5), layout="constrained")
    panels: Any = drawn.subplots(1, len(table.phases), squeeze=False)[0]
    for axes, (name, phase) in zip(panels, table.phases.items(), strict=True):
        axes.plot([row.predicted for row in phase.held_out], [row.measured for row in phase.held_out], "o")
        axes.axline((0.5, 0.5), slope=1, linestyle="--", color="grey")
        axes.set(title=f"{name}: error {phase.error:.1%}", xlabel="predicted, of the full network", ylabel="measured")
        axes.grid(alpha=0.3)
    return drawn


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--generated_tokens", type=int, default=64)
    parser.add_argument("--quarters", action="store_true", help="of four KV groups and more, quarters alone as widths")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="ratios to the full network's time")
    parser.add_argument("--compile", action="store_true", help="run compiled widths")
    parser.add_argument("--graphs", action="store_true", help="and record decode steps as CUDA graphs")
    parser.add_argument("--shape", choices=SHAPES, default=SMOLLM2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    parser.add_argument("--held_out", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=90, help="for the table; the check takes as long again")
    parser.add_argument("--figure", type=Path, default=None, help="where to draw predicted against measured")
    parser.add_argument("--check", action="store_true", help="exit 1 if a figure is beyond its limit")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    backbone = blank(options.shape, getattr(torch, options.dtype), options.device, quarters=options.quarters)
    if options.compile or options.graphs:
        backbone.compile_widths(graphs=options.graphs)
    names = ("batch_size", "prompt_tokens", "generated_tokens", "dtype", "threads")
    workload = Workload(**{name: getattr(options, name) for name in names})
    found = profile(backbone, workload, budget_seconds=options.seconds, held_out=options.held_out)

    bad = []
    kind = f"{options.shape}, {options.dtype}, {workload.name}, {options.threads} thread(s)"
    kind += ", compiled" * (backbone.compiled is not None) + ", CUDA graphs" * options.graphs
    shown = Table(title=f"{options.held_out} held-out sub-networks, {kind}")
    for column in ("phase", "full network", "error", "error of the constant mean", "rank correlation", "spread"):
        shown.add_column(column, no_wrap=True)
    for name, phase in found.phases.items():
        values = check(phase.held_out)
        shown.add_row(
            name,
            f"{phase.table.full:.1f} ms",
            f"{values['error']:.2%}",
            f"{values['error of the constant mean']:.2%}",
            f"{values['rank correlation']:.4f}",
            f"{phase.spread:.2%}",
        )
        allowed = min(ERROR_LIMIT, SHARE_OF_CONSTANT * values["error of the constant mean"])
        bad += [name] * (values["error"] > allowed or values["rank correlation"] < RANK_LIMIT)
    Console(width=140).print(shown)

    reached = Table(title="targets that a sub-network can meet: what a search fitted to them takes when measured")
    for column in ("phase", "target", "predicted", "measured"):
        reached.add_column(column, no_wrap=True)
    rows = targets(backbone, found, options.seconds / 3, options.targets)
    bad += ["targets out of reach"] * (len(rows) < len(options.targets) * len(found.phases))
    for name, target, predicted, measured in rows:
        reached.add_row(name, f"{target}", f"{predicted:.3f}", f"{measured:.3f} ({measured / target - 1:+.1%})")
        bad += [f"{name} {target}"] * (predicted > target or abs(measured / target - 1) > TARGET_LIMIT)
    Console(width=140).print(reached)
    print(f"{device_description(backbone.model.device)['name']}, torch {torch.__version__}")
    if options.figure is not None:
        figure(found).savefig(options.figure, dpi=120)
    if options.check and bad:
        sys.exit(f"beyond the limit: {', '.join(bad)}")


if __name__ == "__main__":
    main()
