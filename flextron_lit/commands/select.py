"""`python main.py select`: the sub-network for a budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info
from rich.table import Table

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import Loaded, load_elastic, shape_of
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.commands.options import add_device, add_latency, add_workload, refuse_workload, workload_of
from flextron_lit.costs import CostTable
from flextron_lit.costs.budget import HELP, Limits
from flextron_lit.data import TextDataModule, file_batches
from flextron_lit.files.whole_file import json_text
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.losses.on_text import Batch, MeasuredLoss
from flextron_lit.routers.from_budget import Routing, Selection, to_json
from flextron_lit.routers.search import SEARCHES, Found, Score, best_random, best_uniform, evolution
from flextron_lit.space import ElasticSpace, SubNetwork
from flextron_lit.terminal.console import show

DEFAULT_SEARCH = "uniform"
COUNT = 24
TOKENS = 1024


def select(
    space: ElasticSpace, limits: Limits, search: str, score: Score, *, count: int, generator: torch.Generator
) -> Found:
    """Search for the sub-network of lowest score within limits, by the name of the search."""
    if search == "uniform":
        return best_uniform(space, limits, score)
    if search == "random":
        return best_random(space, limits, score, count=count, generator=generator)
    return evolution(space, limits, score, count=count, generator=generator)


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
    if selection.predicted is not None:
        yield f"predicted loss {selection.predicted:.3f} nats per token, on the text that the surrogate learned from"
    if selection.calibrated is not None:
        yield f"loss {selection.calibrated:.3f} nats per token, on the training text that the ladder was measured on"


def text_of(loaded: Loaded, text: Path | None, tokens: int) -> tuple[list[Batch], str]:
    """What to measure losses on, and what to call it: a text file, or the validation documents of the training text.

    Raises:
        ValueError: if there is too little, or the checkpoint does not say what it was trained on.
    """
    if text is not None:
        return [*file_batches(text, loaded.tokenizer, tokens)], text.name
    if loaded.text is None:
        raise ValueError("the checkpoint does not say what it was trained on; name a text with --text")
    data = TextDataModule.from_description(loaded.text, tokenizer=str(loaded.folder), validation_tokens=tokens)
    data.prepare_data()
    loaders = data.val_dataloader()
    return [batch for loader in loaders for batch in loader], f"validation documents of {', '.join(data.domain_names)}"


def answer(options: Any, folder: Path) -> tuple[Selection, ElasticSpace, dict[str, CostTable]]:
    """Find the sub-network that a command line asks for: by router or surrogate if it may and can, else by measuring.

    Raises:
        ValueError: for a budget that cannot be met or read, or a router that is not there.
    """
    space = checkpoint.read(folder).space
    device = device_of(options.device, folder)
    shape = shape_of(folder, space)
    tables, latency = known_tables(folder, shape, workload_of(options), options.latency, device)
    refuse_workload(options, latency)
    routing = Routing.read(folder, space, tables)
    limits = routing.parse(options.budget)
    named = ", ".join(f"{limit.table.name} <= {limit.table.show(limit.value)}" for limit in limits)
    if all(limit.loose for limit in limits):
        how = f"no search: the full network meets {named}"
        return Selection(options.budget, space.full(), how, None), space, tables
    if options.search in (None, "router"):
        found = routing.answer(limits)
        if found is not None:
            refuse_without_effect(options, found.how)
            loss = loss_on(options, folder, found.sub_network) if options.text else None
            noted = {"calibrated" if found.measured else "predicted": found.loss}
            return Selection(options.budget, found.sub_network, found.how, loss, **noted), space, tables
        if options.search == "router":
            raise ValueError(f"{folder} holds no router and no surrogate; take --search {', '.join(SEARCHES)}")
    search = options.search or DEFAULT_SEARCH
    loaded = load_elastic(str(folder), device=device)
    where = f", measured on {latency.conditions['device']['name']}" if latency else ""
    batches, text = text_of(loaded, options.text, options.tokens or TOKENS)
    rank_zero_info(f"{search} search: {named}{where}; losses on {text}")
    generator = torch.Generator().manual_seed(options.seed or 0)
    score = shown_loss(MeasuredLoss(loaded.backbone, batches))
    result = select(space, limits, search, score, count=options.count or COUNT, generator=generator)
    how = f"{search} search, {result.evaluations} losses measured on {text}"
    return Selection(options.budget, result.sub_network, how, result.score), space, tables


def refuse_without_effect(options: Any, how: str) -> None:
    """Options of measured searches have no effect where nothing is searched by measuring.

    Raises:
        ValueError: naming one that was given.
    """
    given = [name for name in ("count", "seed") if options[name] is not None]
    given += ["tokens"] if options.tokens is not None and options.text is None else []
    if given:
        raise ValueError(
            f"--{given[0]} has no effect on {how}; choose a search that measures with --search {', '.join(SEARCHES)}"
        )


def loss_on(options: Any, folder: Path, sub_network: SubNetwork) -> float:
    """Loss of an answer on the text that a command line names."""
    loaded = load_elastic(str(folder), device=device_of(options.device, folder))
    batches, _ = text_of(loaded, options.text, options.tokens or TOKENS)
    return MeasuredLoss(loaded.backbone, batches)(sub_network)


def shown_loss(measured: Score) -> Score:
    """A score that tells each loss as it comes."""

    def score(sub_network: SubNetwork) -> float:
        loss = measured(sub_network)
        rank_zero_info(f"  {loss:.3f} nats per token")
        return loss

    return score


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
        default=None,
        choices=[*SEARCHES, "router"],
        help="router: a look-up, or a search by the surrogate where no router was trained for the budget; uniform: all "
        "layers alike; random: the best of --count; evolution: --count losses. Default: router if the checkpoint has "
        "one or a surrogate, else uniform.",
    )
    parser.add_argument("--count", type=int, default=None, help=f"Losses that random and evolution measure ({COUNT}).")
    text = "A text file to measure losses on. Default: validation documents, where losses are measured at all."
    parser.add_argument("--text", type=Path, default=None, help=text)
    parser.add_argument(
        "--tokens", type=int, default=None, help=f"Tokens of it, or of each validation domain ({TOKENS})."
    )
    add_latency(parser)
    add_workload(parser)
    add_device(parser)
    parser.add_argument("--seed", type=int, default=None, help="Random seed of random and evolution (0).")
    parser.add_argument("--json", action="store_true", help="Print JSON alone, for scripts.")
    parser.add_argument("--output", type=Path, default=None, help="Write the JSON to this file too.")
    options = parser.parse_args(list(args))
    folder = locate(options.checkpoint).checkpoint
    selection, space, tables = answer(options, folder)
    text = json_text(to_json(selection, space, tables))
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    show(text.rstrip()) if options.json else show(*shown(selection, space, tables))
