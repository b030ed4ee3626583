"""`python main.py info`: what a Flextron checkpoint holds and how it was made."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.filesize import decimal
from rich.table import Table

from flextron_lit.checkpoint import MEND, RECORD
from flextron_lit.checkpoint.description import describe
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.files.damage import damage
from flextron_lit.files.whole_file import json_text
from flextron_lit.terminal.console import about, end_with_the_reader, huge, ranges, settings, short, show, two_columns

UNITS = {"mlp": "neurons", "attention": "KV groups"}


def tables(description: Mapping[str, Any]) -> Iterator[Table]:
    """One table of the checkpoint, one of each stage that made it."""
    yield two_columns(f"Flextron checkpoint {description['checkpoint']}", list(_contents(description)))
    history = description["history"]
    for number, record in enumerate(history, 1):
        title = f"stage {number} of {len(history)}: {record.get('stage', 'unknown')}"
        yield two_columns(title, list(_stage(record)))


def _contents(description: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model = description["model"]
    yield "model", f"{model['class']}, {', '.join(model['dtype'])}"
    yield (
        "shape",
        f"{model['num_hidden_layers']} layers, hidden size {model['hidden_size']}, vocabulary {model['vocab_size']}\n"
        f"{model['num_attention_heads']} heads in {model['num_key_value_heads']} KV groups, "
        f"{model['intermediate_size']} neurons",
    )
    largest_first = sorted(model["num_parameters_by_part"].items(), key=lambda item: -item[1])
    parts = ", ".join(f"{part} {short(count)}" for part, count in largest_first)
    tied = "; tied embeddings count once" if model["tie_word_embeddings"] else ""
    yield "parameters", f"{model['num_parameters']:,} ({parts}{tied})"
    if model["num_compensation_parameters"]:
        share = model["num_compensation_parameters"] / model["num_parameters"]
        yield (
            "narrower widths",
            f"{model['num_compensation_parameters']:,} parameters of their own ({model['compensation']}), {share:.0%} "
            "more in memory while all budgets are kept; an export holds those of its widths in place of others",
        )
    yield "size on disk", f"{decimal(description['bytes'])} in {len(description['files'])} files"
    yield "sha256", _integrity(description)
    yield "search space", "\n".join(_space(description["space"]["groups"]))
    yield "sub-networks", huge(description["space"]["num_sub_networks"])
    yield "cost tables", ", ".join(description["costs"]) or "none"
    yield "routers", ", ".join(description["routers"]) or "none"
    if description["stale"]:
        marks = (f"{name}, since {stage} changed the network" for name, stage in description["stale"].items())
        yield "stale", "\n".join(marks)
    yield "surrogate", description["surrogate"] or "none"
    yield "excess losses", description["excess_losses"] or "none"
    if description["evaluations"]:
        yield "evaluations", "\n".join(line for each in description["evaluations"] for line in _evaluation(each))


def _evaluation(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """What was noted of one `evaluate`: a line for each text or task."""
    yield f"{evaluation['file']}:"
    by_text: dict[str, list[str]] = {}
    for row in evaluation["results"]:
        name = row["network"] if row["budget"] is None else f"{row['network']} {row['budget']}"
        by_text.setdefault(f"{row['metric']} of {row['text']}", []).append(f"{name} {row['value']:.3f}")
    yield from (f"  {text}: {', '.join(values)}" for text, values in by_text.items())


def _integrity(description: Mapping[str, Any]) -> str:
    verified = description["verified"]
    if verified is None:
        return "not verified"
    if not verified:
        return "cannot be verified: written before digests were noted"
    unknown = [name for name in description["files"] if name not in verified]
    return f"{len(verified)} files are as they were written" + (f"; added since: {', '.join(unknown)}" * bool(unknown))


def _space(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    kinds = [group["kind"] for group in groups]
    for group in groups:
        layers, kind = group["layers"], group["kind"]
        named = f" (layers {ranges(layers)})" if kinds.count(kind) > 1 else ""
        yield f"{len(layers)} x {kind}: {UNITS[kind]} {group['widths']}{named}"


def _stage(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if key == "stage":
            continue
        if key == "data" and isinstance(value, Mapping):
            yield key, "\n".join(_data(value))
        elif isinstance(value, Mapping):
            yield key, "\n".join(settings(value))
        else:
            yield key.replace("_", " "), f"{value:,}" if key in ("steps", "tokens") else str(value)


def _data(data: Mapping[str, Any]) -> Iterator[str]:
    for name, domain in data.get("domains", {}).items():
        tokens = ", ".join(f"{count:,} {split}" for split, count in domain.get("tokens", {}).items())
        yield f"{name}: {domain.get('source')}, weight {domain.get('weight')}, tokens {tokens}"
    rest = {key: value for key, value in data.items() if key not in ("domains", "tokenizer")}
    yield from settings(rest)


def command(args: Sequence[str]) -> None:
    """What a Flextron checkpoint holds and how it was made.

    Example: main.py info runs/quickstart/elastic
    """
    end_with_the_reader()
    parser = ArgumentParser(**about(command))
    parser.add_argument("folder", type=Path, help=FOLDER_HELP)
    parser.add_argument("--json", action="store_true", help="Print JSON, for scripts.")
    parser.add_argument("--no_verify", action="store_true", help="Do not read all files to compare their sha256.")
    options = parser.parse_args(list(args))
    location = locate(options.folder)
    description = describe(location, verify=not options.no_verify)
    if options.json:
        show(json_text(description).rstrip())
        return
    if location.run_folder is not None:
        status = location.run_folder.status
        show(f"{options.folder} is a run folder ({status}); its checkpoint is {location.checkpoint}")
    with damage(location.checkpoint / RECORD, MEND):
        shown = list(tables(description))
    show(*shown)
