"""`python main.py select`: the sub-network for a budget."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from rich.table import Table

from flextron_lit import checkpoint
from flextron_lit.commands.options import CommandLine, costs_of, place_of, refuse_workload
from flextron_lit.costs import CostTable
from flextron_lit.costs.budget import HELP
from flextron_lit.evaluation.sub_network import COUNT, TOKENS, Asked, answer
from flextron_lit.files.whole_file import json_text
from flextron_lit.latency.miss import told
from flextron_lit.routers.from_budget import Selection, to_json
from flextron_lit.routers.search import SEARCHES
from flextron_lit.space import ElasticSpace
from flextron_lit.terminal.console import show, table


def shown(selection: Selection, space: ElasticSpace, tables: Mapping[str, CostTable]) -> Iterable[Table | str]:
    """An answer, for people."""
    yield f"sub-network for {selection.budget}: {selection.how}"
    widths: dict[int, dict[str, str]] = {}
    for block, width in zip(space.blocks, space.widths(selection.sub_network), strict=True):
        widths.setdefault(block.layer, {})[block.kind] = f"{width} of {block.full}"
    layers = [(str(layer), of["attention"], of["mlp"]) for layer, of in sorted(widths.items())]
    yield table(("layer", "KV groups", "neurons"), layers)
    costs = [
        (name, each.show(each.cost(selection.sub_network)), f"{each.ratio(selection.sub_network):.3f}")
        for name, each in tables.items()
    ]
    yield table(("cost", "", "of the full network"), costs, left=["cost"])
    if selection.may_miss:
        yield told(selection.may_miss)
    if selection.loss is not None:
        yield f"loss {selection.loss:.3f} nats per token"
    if selection.predicted is not None:
        yield f"predicted loss {selection.predicted:.3f} nats per token, on the text that the surrogate learned from"
    if selection.calibrated is not None:
        yield f"loss {selection.calibrated:.3f} nats per token, on the training text that the ladder was measured on"


def command(args: Sequence[str]) -> None:
    """The sub-network for a budget: widths, costs, loss.

    Example: main.py select --checkpoint runs/quickstart/elastic --budget 0.6
    """
    parser = CommandLine.on_checkpoint(command)
    parser.add_argument("--budget", type=str, required=True, help=HELP)
    parser.add_argument(
        "--search",
        choices=[*SEARCHES, "router"],
        help="router: a look-up, or, where no router was trained for the budget, a search by the surrogate or the "
        "excess losses; uniform: all layers alike; random: the best of --count; evolution: --count losses. Default: "
        "router if the checkpoint has any of these, else uniform.",
    )
    parser.add_argument("--count", type=int, help=f"Losses that random and evolution measure ({COUNT}).")
    text = "A text to measure losses on. Default: validation documents, where losses are measured at all."
    parser.add_text(text, f"Tokens of it, or of each validation domain ({TOKENS}).")
    parser.add_costs()
    parser.add_compile()
    parser.add_argument("--seed", type=int, help="Random seed of random and evolution (0).")
    parser.add_json()
    parser.add_argument("--output", type=Path, help="Write the JSON to this file too.")
    options = parser.parse_args(list(args))
    folder, device = place_of(options)
    tables, latency = costs_of(options, folder, device, compiled=options.compile)
    refuse_workload(options, latency)
    asked = Asked(**{field.name: options[field.name] for field in fields(Asked)})
    selection = answer(options.budget, folder, (tables, latency), device, asked)
    space = checkpoint.read(folder).space
    text = json_text(to_json(selection, space, tables))
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    show(text.rstrip()) if options.json else show(*shown(selection, space, tables))
