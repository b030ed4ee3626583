"""`python main.py export`: one sub-network as a stand-alone model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic, shape_of
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.commands.options import add_device, add_latency, add_workload, workload_of
from flextron_lit.commands.select import TOKENS, answer, shown, text_of
from flextron_lit.costs.budget import HELP
from flextron_lit.export.card import Origin
from flextron_lit.export.forms import FORMATS, QUANTIZATIONS, Form
from flextron_lit.export.verification import Verified
from flextron_lit.export.writing import RECORD, export, refuse_existing
from flextron_lit.files.damage import damage, read_json
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.routers.from_budget import Selection
from flextron_lit.space import ElasticSpace, SubNetwork
from flextron_lit.terminal.console import show


def read_selection(path: Path, space: ElasticSpace) -> Selection:
    """The sub-network that `select --output` or an earlier export wrote down.

    Raises:
        ValueError: if the file is no such JSON, or is of another space.
    """
    other = "is not what `select --output` writes"
    with damage(path, f"name such a file, or the {RECORD} of an export", what=other):
        record = read_json(path)
        sub_network, widths = SubNetwork.from_json(record["sub_network"]), dict(record["widths"])
        budget, how = str(record["budget"]), str(record["how"])
    own = {block.name: width for block, width in zip(space.blocks, space.widths(sub_network), strict=True)}
    for name, width in own.items():
        if widths.get(name) != width:
            raise ValueError(
                f"{path} was made for another space: there {name} has width {widths.get(name)}, here the same choice "
                f"is width {width}; select again on this checkpoint"
            )
    return Selection(budget, sub_network, f"{path.name} ({how})", None)


def chosen(options: Any, folder: Path) -> Selection:
    """The sub-network that a command line names or asks for.

    Raises:
        ValueError: unless there is exactly one of budget and file, for tokens of no text, or as `answer` and
            `read_selection`.
    """
    if (options.budget is None) == (options.sub_network is None):
        raise ValueError("name either a --budget, or with --sub_network a file that `select --output` wrote")
    if options.tokens is not None and options.text is None:
        raise ValueError("--tokens has no effect without --text")
    if options.sub_network is not None:
        return read_selection(options.sub_network, checkpoint.read(folder).space)
    asked = Namespace(**vars(options.clone()), search=None, count=None, seed=None)
    return answer(asked, folder)[0]


def origin_of(options: Any, folder: Path, selection: Selection) -> Origin:
    """What the model card says of a sub-network's costs and of where it comes from."""
    record = checkpoint.read(folder)
    shape, device = shape_of(folder, record.space), device_of(options.device, folder)
    tables, latency = known_tables(folder, shape, workload_of(options), options.latency, device)
    return Origin(
        source=record.history[0]["source"] if record.history else str(folder),
        selection=selection,
        tables=tables,
        workload=latency.workload if latency else workload_of(options),
        measured_on=latency.conditions["device"]["name"] if latency else None,
        text=options.text.name if options.text else None,
    )


def told(folder: Path, form: Form, verified: Verified) -> str:
    """What became of it, in a few words."""
    compared = (
        f"logits differ from the elastic network's in float32 by {verified.difference:.1e} of the largest, "
        f"{verified.agreement:.0%} of the most likely tokens agree"
    )
    loss = ""
    if verified.loss is not None and verified.elastic_loss is not None:
        loss = f"; loss {verified.loss:.4f}, of the elastic network {verified.elastic_loss:.4f} nats per token"
    return f"wrote {folder} ({form.numbers}), read back: {compared}{loss}; {folder / 'README.md'} says how to load it"


def command(args: Sequence[str]) -> None:
    """`python main.py export`."""
    parser = ArgumentParser(
        prog="main.py export",
        description="One sub-network as a stand-alone model that loads without this project, verified and with a model "
        "card. It is static: a dynamic router needs the elastic network, so there is no export of one. "
        "Example: main.py export --checkpoint runs/quickstart/static_router --budget 0.6 --output small",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help=FOLDER_HELP)
    parser.add_argument("--budget", type=str, default=None, help=f"{HELP} 1 is the full network.")
    parser.add_argument(
        "--sub_network",
        type=Path,
        default=None,
        help=f"Instead of a budget: the JSON that `select --output` wrote, or the {RECORD} of an earlier export.",
    )
    parser.add_argument("--output", type=Path, required=True, help="The folder to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace an earlier export of that name.")
    parser.add_argument(
        "--format",
        default="hf",
        choices=FORMATS,
        help="hf: for transformers, as a stock class where one holds the widths, else as remote-code; stock: a stock "
        "class or nothing; remote-code: a class of its own beside the weights, for trust_remote_code, of any widths; "
        "gguf: for llama.cpp.",
    )
    parser.add_argument(
        "--quantize",
        default=None,
        choices=QUANTIZATIONS,
        help="Quantisation of the sliced weights: int8 or nf4 with bitsandbytes for transformers, q8_0 for gguf.",
    )
    parser.add_argument(
        "--text", type=Path, default=None, help="A text file to measure losses on. Default: none are measured."
    )
    parser.add_argument("--tokens", type=int, default=None, help=f"Tokens of it ({TOKENS}).")
    add_latency(parser)
    add_workload(parser)
    add_device(parser)
    options = parser.parse_args(list(args))
    folder = locate(options.checkpoint).checkpoint
    refuse_existing(options.output, overwrite=options.overwrite)
    form = Form(options.format, workload_of(options).dtype, options.quantize)
    origin = origin_of(options, folder, chosen(options, folder))
    loaded = load_elastic(str(folder), device=device_of(options.device, folder))
    batches, _ = text_of(loaded, options.text, options.tokens or TOKENS) if options.text else ([], "")
    verified = export(loaded, options.output, form, origin, batches)
    show(*shown(origin.selection, loaded.backbone.space, origin.tables), told(options.output, form, verified))
