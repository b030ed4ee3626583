"""`python main.py export`: one sub-network as a stand-alone model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.commands.options import CommandLine, costs_of, place_of, refuse_workload, workload_of
from flextron_lit.commands.select import shown
from flextron_lit.costs.budget import HELP
from flextron_lit.evaluation.sub_network import TOKENS, Asked, answer
from flextron_lit.export.card import Origin
from flextron_lit.export.forms import FORMATS, QUANTIZATIONS, Form
from flextron_lit.export.verification import Verified
from flextron_lit.export.writing import RECORD, export, read_selection, refuse_existing
from flextron_lit.terminal.console import show


def check(options: Any) -> None:
    """Refuse options that say two things, or nothing.

    Raises:
        ValueError: unless there is exactly one of budget and file, or for tokens of no text.
    """
    if (options.budget is None) == (options.sub_network is None):
        raise ValueError("name either a --budget, or with --sub_network a file that `select --output` wrote")
    if options.tokens is not None and options.text is None:
        raise ValueError("--tokens has no effect without --text")


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
    """One sub-network as a stand-alone model that loads without this project, verified and with a model card.

    It is static: a dynamic router needs the elastic network, so there is no export of one. Example: main.py export
    --checkpoint runs/quickstart/static_router --budget 0.6 --output small
    """
    parser = CommandLine.on_checkpoint(command)
    parser.add_argument("--budget", type=str, help=f"{HELP} 1 is the full network.")
    text = f"Instead of a budget: the JSON that `select --output` wrote, or the {RECORD} of an earlier export."
    parser.add_argument("--sub_network", type=Path, help=text)
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
    text = "Quantisation of the sliced weights: int8 or nf4 with bitsandbytes for transformers, q8_0 for gguf."
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help=text)
    text = "A text to measure losses on. Default: none are measured."
    parser.add_text(text, f"Tokens of it ({TOKENS}).")
    parser.add_costs()
    options = parser.parse_args(list(args))
    folder, device = place_of(options)
    refuse_existing(options.output, overwrite=options.overwrite)
    workload = workload_of(options)
    form = Form(options.format, workload.dtype, options.quantize)
    check(options)
    record = checkpoint.read(folder)
    tables, latency = costs_of(options, folder, device)
    if options.sub_network is not None:
        selection = read_selection(options.sub_network, record.space)
    else:
        refuse_workload(options, latency)
        asked = Asked(text=options.text, tokens=options.tokens)
        selection = answer(options.budget, folder, (tables, latency), device, asked)
    origin = Origin(
        source=record.history[0]["source"] if record.history else str(folder),
        selection=selection,
        tables=tables,
        workload=latency.workload if latency else workload,
        measured_on=latency.conditions["device"]["name"] if latency else None,
        text=options.text.name if options.text else None,
    )
    loaded = load_elastic(str(folder), device=device)
    batches = loaded.batches_of(options.text, options.tokens or TOKENS) if options.text else []
    verified = export(loaded, options.output, form, origin, batches)
    show(*shown(selection, record.space, tables), told(options.output, form, verified))
