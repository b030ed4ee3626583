"""`python main.py select`: the sub-network for a budget."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table
from torch import Tensor

from flextron_lit.budget import HELP, Limits, parse_budget
from flextron_lit.costs import COUNTED, CostTable, Workload
from flextron_lit.costs.latency import LatencyTable, device_description, read_all
from flextron_lit.data import TextDataModule, text_blocks
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.inspection.location import FOLDER_HELP, locate
from flextron_lit.loading import Loaded, load_elastic
from flextron_lit.losses import cross_entropy
from flextron_lit.profiling import add_workload, device_of, workload_of
from flextron_lit.search import SEARCHES, Found, Score, best_random, best_uniform, evolution
from flextron_lit.space import ElasticSpace, SubNetwork
from flextron_lit.tables import show

Batch = Mapping[str, Tensor]
BLOCK_SIZE = 512


@dataclass(frozen=True)
class Selection:
    """What `select` answers."""

    budget: str
    sub_network: SubNetwork
    how: str
    """The search, and what it went by."""
    loss: float | None
    """Measured, in nats per token; None where nothing had to be measured."""


def known_tables(
    folder: Path, backbone: ElasticBackbone, workload: Workload, latency: str | None
) -> tuple[dict[str, CostTable], LatencyTable | None]:
    """Every cost of a network by name: the counted ones, and the latencies that were measured.

    Args:
        folder: the Flextron checkpoint.
        backbone: its network.
        workload: what FLOPs, cache and memory are counted for, where no latency table says so.
        latency: name of the latency table to use, of whatever device; None means the only one there is, of this one.

    Raises:
        ValueError: if there are several latency tables to choose from, none of that name, or only another device's.
    """
    measured = {path.stem: table for path, table in read_all(folder, backbone.space).items()}
    chosen = _chosen(measured, latency, {"device": device_description(backbone.model.device)})
    counted = {name: count(backbone, chosen.workload if chosen else workload) for name, count in COUNTED.items()}
    return {**(chosen.tables() if chosen else {}), **counted}, chosen


def _chosen(measured: Mapping[str, LatencyTable], name: str | None, here: Mapping[str, Any]) -> LatencyTable | None:
    if name is not None:
        if name not in measured:
            raise ValueError(f"there is no latency table {name!r}; there are {', '.join(measured) or 'none'}")
        return measured[name]
    fitting = {name: table for name, table in measured.items() if table.conditions["device"] == here["device"]}
    if len(fitting) > 1:
        raise ValueError(f"there are several latency tables; choose one with --latency: {', '.join(fitting)}")
    if measured and not fitting:
        name, table = next(iter(measured.items()))
        try:
            table.check(here)
        except ValueError as error:
            raise ValueError(f"{error}, or take it all the same with --latency {name}") from error
    return next(iter(fitting.values()), None)


def measured_loss(backbone: ElasticBackbone, batches: Sequence[Batch]) -> Score:
    """A score for searches: the loss on some text, in nats per token."""

    @torch.no_grad()
    def score(sub_network: SubNetwork) -> float:
        total, count = 0.0, 0
        with backbone.use(sub_network):
            for batch in batches:
                inputs = {k: v.to(backbone.model.device) for k, v in batch.items()}
                labels = inputs.pop("labels")
                loss, tokens = cross_entropy(backbone.model(**inputs, use_cache=False).logits, labels)
                total, count = total + loss.item(), count + int(tokens)
        rank_zero_info(f"  {total / count:.3f} nats per token")
        return total / count

    return score


def select(
    space: ElasticSpace, limits: Limits, search: str, score: Score, *, count: int, generator: torch.Generator
) -> Found:
    """Search for the sub-network of lowest score within limits, by the name of the search."""
    if search == "uniform":
        return best_uniform(space, limits, score)
    if search == "random":
        return best_random(space, limits, score, count=count, generator=generator)
    return evolution(space, limits, score, count=count, generator=generator)


def to_json(selection: Selection, space: ElasticSpace, tables: Mapping[str, CostTable]) -> dict[str, Any]:
    """An answer, for scripts."""
    sub_network = selection.sub_network
    widths = zip(space.blocks, space.widths(sub_network), strict=True)
    return {
        "budget": selection.budget,
        "how": selection.how,
        "loss": selection.loss,
        "sub_network": sub_network.to_json(),
        "widths": {block.name: width for block, width in widths},
        "costs": {
            name: {"cost": table.cost(sub_network), "unit": table.unit, "ratio": table.ratio(sub_network)}
            for name, table in tables.items()
        },
    }


def shown(selection: Selection, space: ElasticSpace, tables: Mapping[str, CostTable]) -> Iterable[Table | str]:
    """An answer, for people."""
    yield f"sub-network for {selection.budget}: {selection.how}"
    widths = Table()
    for column in ("layer", "KV groups", "neurons"):
        widths.add_column(column, justify="right")
    chosen = space.widths(selection.sub_network)
    for layer in sorted({block.layer for block in space.blocks}):
        of = {b.kind: f"{w} of {b.full}" for b, w in zip(space.blocks, chosen, strict=True) if b.layer == layer}
        widths.add_row(str(layer), of["attention"], of["mlp"])
    yield widths
    costs = Table()
    for column in ("cost", "", "of the full network"):
        costs.add_column(column, justify="left" if column == "cost" else "right", no_wrap=True)
    for name, table in tables.items():
        cost = table.show(table.cost(selection.sub_network))
        costs.add_row(name, cost, f"{table.ratio(selection.sub_network):.3f}")
    yield costs
    if selection.loss is not None:
        yield f"loss {selection.loss:.3f} nats per token"


def text_of(loaded: Loaded, source: str, text: Path | None, tokens: int) -> tuple[list[Batch], str]:
    """What to measure losses on, and what to call it: a text file, or the validation documents of the training text.

    Raises:
        ValueError: if there is too little, or the checkpoint does not say what it was trained on.
    """
    if text is not None:
        blocks = text_blocks(text, loaded.tokenizer, block_size=min(BLOCK_SIZE, tokens), tokens=tokens)
        return [{"input_ids": block[None], "labels": block[None]} for block in blocks], text.name
    history = loaded.record.history if loaded.record else []
    if not history or not history[-1].get("data"):
        raise ValueError("the checkpoint does not say what it was trained on; name a text with --text")
    data = TextDataModule.from_description(history[-1]["data"], tokenizer=source, validation_tokens=tokens)
    data.prepare_data()
    loaders = data.val_dataloader()
    return [batch for loader in loaders for batch in loader], f"validation documents of {', '.join(data.domain_names)}"


def answer(options: Any, folder: Path) -> tuple[Selection, ElasticSpace, dict[str, CostTable]]:
    """Find the sub-network that a command line asks for.

    Raises:
        ValueError: for a budget that cannot be met or read, or a search that is not there.
    """
    loaded = load_elastic(str(folder), device=device_of(options.device))
    backbone = loaded.backbone
    space = backbone.space
    tables, latency = known_tables(folder, backbone, workload_of(options), options.latency)
    limits = parse_budget(options.budget, tables)
    named = ", ".join(f"{limit.table.name} <= {limit.table.show(limit.value)}" for limit in limits)
    if all(limit.loose for limit in limits):
        how = f"no search: the full network meets {named}"
        return Selection(options.budget, space.full(), how, None), space, tables
    device = f", measured on {latency.conditions['device']['name']}" if latency else ""
    batches, text = text_of(loaded, str(folder), options.text, options.tokens)
    rank_zero_info(f"{options.search} search: {named}{device}; losses on {text}")
    generator = torch.Generator().manual_seed(options.seed)
    score = measured_loss(backbone, batches)
    found = select(space, limits, options.search, score, count=options.count, generator=generator)
    how = f"{options.search} search, {found.evaluations} losses measured on {text}"
    return Selection(options.budget, found.sub_network, how, found.score), space, tables


def command(args: Sequence[str]) -> None:
    """`python main.py select`."""
    parser = ArgumentParser(
        prog="main.py select",
        description="The sub-network for a budget: widths, costs, loss. "
        "Example: main.py select --checkpoint runs/quickstart/elastic --budget 0.6",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help=FOLDER_HELP)
    parser.add_argument("--budget", type=str, required=True, help=HELP)
    parser.add_argument(
        "--search",
        default="uniform",
        choices=[*SEARCHES, "router"],
        help="uniform: all layers alike; random: the best of --count; evolution: --count losses; router: a look-up, "
        "once a router stage has run.",
    )
    parser.add_argument("--count", type=int, default=24, help="Losses that random and evolution measure.")
    parser.add_argument("--text", type=Path, default=None, help="A text file to measure losses on.")
    parser.add_argument("--tokens", type=int, default=1024, help="Tokens of it, or of each validation domain.")
    parser.add_argument("--latency", type=str, default=None, help="Name of a latency table, where there are several.")
    add_workload(parser)
    parser.add_argument("--device", type=str, default=None, help="cpu, cuda, cuda:1; by default a GPU if there is one.")
    parser.add_argument("--seed", type=int, default=0, help="Of random and evolution.")
    parser.add_argument("--json", action="store_true", help="Print JSON alone, for scripts.")
    parser.add_argument("--output", type=Path, default=None, help="Write the JSON to this file too.")
    options = parser.parse_args(list(args))
    folder = locate(options.checkpoint).checkpoint
    if options.search == "router":
        raise ValueError(f"{folder} holds no router; take --search {', '.join(SEARCHES)}")
    selection, space, tables = answer(options, folder)
    text = json.dumps(to_json(selection, space, tables), indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    show(text) if options.json else show(*shown(selection, space, tables))
