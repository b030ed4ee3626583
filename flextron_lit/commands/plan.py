"""`python main.py plan`: what training a model takes, worked out before a GPU is rented."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from rich.table import Table

from flextron_lit.commands.options import CommandLine, refuse_below_one
from flextron_lit.elastic.compensation import FORMS
from flextron_lit.files.whole_file import json_text
from flextron_lit.planning.asked import OPTIMIZERS, PRECISIONS, STAGES, Stage, TrainingSettings
from flextron_lit.planning.gpu import Gpu
from flextron_lit.planning.model_shape import shape_of
from flextron_lit.planning.plan import Planner, Row, Work
from flextron_lit.terminal.console import about, short, show, table
from flextron_lit.terminal.progress import progress

PARTS = {
    "network": "network",
    "own": "own_projections",
    "original": "original",
    "gradients": "gradients",
    "buckets": "gradient_buckets",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "update": "update",
    "tables": "tables",
}
"""Heads of columns, and the parts that they show."""
MODEL = (
    "A config.json or a folder that has one, a Flextron checkpoint, or a model on the Hub, whose config alone is "
    "fetched. No weights are read."
)
GIVEN: tuple[tuple[str, type, str], ...] = (
    ("batch_size", int, "data.init_args.batch_size: blocks at once, of each process."),
    ("block_size", int, "data.init_args.block_size: tokens of a block."),
    ("loss_chunk", int, "model.init_args.loss_chunk: tokens whose logits stand at once; 0: all. Default: the stages'."),
)


def shown(rows: Sequence[Row], works: Sequence[Work], gpu: Gpu) -> Iterable[Table | str]:
    """A plan, for people."""
    heads = ("stage", "GPUs", "strategy", *PARTS, "peak", "fits")
    title = "GB of each GPU at the peak of a step, by what they are (worked out, not measured)"
    cells = (_cells(row) for row in rows)
    yield table(heads, cells, left=["stage", "strategy", "fits"], title=title, title_justify="left")
    yield (
        f"fits: at most {gpu.usable_bytes / 1e9:.1f} GB, {gpu.usable_share:.0%} of {gpu.memory_gb:g} GB. Gathered "
        "layers of fsdp2 are among activations; update: what an optimizer takes beside its states while it updates"
    )
    for row in rows:
        if row.refused:
            yield f"{_name(row)}: refused, {row.refused}"
        elif row.changes is None:
            yield f"{_name(row)}: no setting is enough; take fsdp2, more GPUs or larger ones"
        elif row.changes:
            yield "\n  ".join([f"{_name(row)}: fits with", *row.changes])
    heads = ("stage", "tokens", "FLOPs a token", "GPU hours", "host GB a process")
    yield table(heads, map(_counts, works), left=["stage"])
    yield (
        f"GPU hours: at {gpu.share_of_peak:.0%} of {gpu.peak_tflops:g} TFLOPS, a guess, of steps that draw the widest "
        "narrower sub-network; host: while a process loads, which reads the network in float32"
    )


def _cells(row: Row) -> tuple[str, ...]:
    parts = (_size(row.parts.get(part, 0.0)) for part in PARTS.values())
    fits = "refused" if row.refused else "yes" if row.fits else "no"
    return (row.stage, str(row.gpus), row.strategy, *parts, _size(row.peak), fits)


def _counts(work: Work) -> tuple[str, ...]:
    hours, host = f"{work.gpu_hours:.1f}", f"{work.loading_bytes / 1e9:.1f}"
    return work.stage, short(work.tokens), short(round(work.flops_per_token)), hours, host


def _size(size: float) -> str:
    return f"{size / 1e9:.2f}" if size else ""


def _name(row: Row) -> str:
    return f"{row.stage} on {row.gpus} x {row.strategy}" if row.gpus > 1 else f"{row.stage} on {row.strategy}"


def to_json(planner: Planner, rows: Sequence[Row], works: Sequence[Work]) -> dict[str, Any]:
    """A plan as JSON: bytes, FLOPs, hours."""
    return {
        "settings": asdict(planner.settings),
        "gpu": asdict(planner.gpu),
        "rows": [asdict(row) | {"peak_bytes": row.peak} for row in rows],
        "work": [asdict(work) for work in works],
    }


def _parser() -> ArgumentParser:
    parser = CommandLine(**about(command))
    parser.add_argument("--checkpoint", type=str, required=True, help=MODEL)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES], help="Which stages.")
    text = "Numbers of GPUs, a process each; of several, ddp and fsdp2 are planned."
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8], help=text)
    defaults = TrainingSettings()
    text = "trainer.precision."
    parser.add_argument("--precision", choices=PRECISIONS, default=defaults.precision, help=text)
    for name, kind, text in GIVEN:
        parser.add_argument(f"--{name}", type=kind, default=getattr(defaults, name), help=text)
    text = "model.init_args.activation_checkpointing, of stages that train the network."
    parser.add_argument("--activation_checkpointing", action="store_true", help=text)
    text = "AdamW as torch takes it on a GPU, with fused: true, or bitsandbytes' 8-bit one."
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default=defaults.optimizer, help=text)
    text = "Something is distilled from the frozen original (distillation.full_from_original)."
    parser.add_argument("--from_original", action="store_true", help=text)
    text = "calibration.compensation: what narrower widths have of their own."
    parser.add_argument("--compensation", choices=FORMS, default=defaults.compensation, help=text)
    for blocks in ("mlp", "attention"):
        text = f"Widths of {blocks} blocks as ratios, ascending to 1. Default: the checkpoint's, or those of training."
        parser.add_argument(f"--{blocks}", type=float, nargs="+", help=text)
    parser.add_argument("--tokens", type=int, default=10**9, help="Tokens that stages train on.")
    for field in fields(Gpu):
        parser.add_argument(f"--{field.name}", type=float, default=field.default, help=GPU[field.name])
    parser.add_json()
    parser.add_argument("--output", type=Path, help="Write the JSON to this file too.")
    return parser


GPU = {
    "memory_gb": "Memory of a GPU in 10^9 bytes.",
    "usable_share": "Share of it for tensors; CUDA, NCCL and what lies unused between tensors take the rest.",
    "peak_tflops": "10^12 dense FLOPs a second of a GPU in the type that products run in, as its data sheet says.",
    "share_of_peak": "Share of them that training gets, a guess.",
}


def command(args: Sequence[str]) -> None:
    """What training a model takes: bytes by stage, strategy and number of GPUs, hours, and what to set so that it fits.

    Example: main.py plan --checkpoint my-model/config.json --gpus 1 8 --memory_gb 80
    """
    options = _parser().parse_args(list(args))
    refuse_below_one(options, "tokens")
    if min(options.gpus) < 1:
        raise ValueError(f"--gpus must be 1 or more, not {min(options.gpus)}")
    settings = TrainingSettings(**{field.name: options[field.name] for field in fields(TrainingSettings)})
    gpu = Gpu(**{field.name: options[field.name] for field in fields(Gpu)})
    shape = shape_of(options.checkpoint, options.mlp, options.attention)
    planner = Planner.of(shape, settings, gpu, sorted({*options.gpus}))
    rows: list[Row] = []
    works: list[Work] = []
    stages: list[Stage] = [stage for stage in STAGES if stage in options.stages]
    for stage in progress(stages, "rehearsing a step of each stage"):
        rows += planner.rows(stage)
        works.append(planner.work(stage, options.tokens))
    text = json_text(to_json(planner, rows, works))
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    show(text.rstrip()) if options.json else show(*shown(rows, works, gpu))
