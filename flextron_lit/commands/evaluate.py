"""`python main.py evaluate`: what each budget loses on texts, and scores on tasks of the LM evaluation harness."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flextron_lit import checkpoint
from flextron_lit.checkpoint.location import Location, locate
from flextron_lit.commands.options import CommandLine, refuse_below_one
from flextron_lit.costs.budget import HELP
from flextron_lit.evaluation import loss_rows as measured
from flextron_lit.evaluation import task_rows as scored
from flextron_lit.evaluation.evaluation import HARNESS, Evaluation
from flextron_lit.evaluation.loss_rows import Measurement, Row
from flextron_lit.evaluation.networks import WAYS, Way, routed, ways_of
from flextron_lit.evaluation.results import HTML, JSON, Results, default_output
from flextron_lit.evaluation.texts import TOKENS, Texts, texts_of
from flextron_lit.files.provenance import git_commit, now, versions
from flextron_lit.files.whole_file import json_text
from flextron_lit.latency.device import device_description
from flextron_lit.latency.device_choice import device_of
from flextron_lit.model import FlextronModel
from flextron_lit.report.assembly import report_evaluation
from flextron_lit.stages.validation import UNIFORM
from flextron_lit.terminal.console import show

if TYPE_CHECKING:
    # an optional extra
    from flextron_lit.evaluation.harness import LoadedTask

BATCH_SIZE = 4
"""Requests at once: on one core a third faster than one by one; 16 are no faster, since all logits are kept."""
NEEDED = {"budgets": ("networks", "latency"), "tasks": ("limit", "include_path", "batch_size", "only_tasks")}
"""Options without which others have no effect."""


def parser() -> CommandLine:
    """Of the command line."""
    made = CommandLine.on_checkpoint(command)
    text = f"Each as for generate: {HELP} The full network is always evaluated; default: it alone."
    made.add_argument("--budgets", type=str, nargs="+", default=[], help=text)
    text = (
        "How budgets are answered. static: by the static router, or a search by the surrogate; dynamic: by the dynamic "
        "router; uniform: by the best sub-network with all layers alike. Default: all that the checkpoint can."
    )
    made.add_argument("--networks", nargs="+", choices=WAYS, help=text)
    text = "Files, folders or sources of text to measure losses on, read as the ends of names say: .jsonl, .ndjson, "
    text += ".json, .parquet, else plain text. Default: the test documents of the training text."
    made.add_argument("--text", type=Path, nargs="+", default=[], help=text)
    text = f"Tokens of each file or domain ({TOKENS}, or what the smallest domain has)."
    made.add_argument("--tokens", type=int, help=text)
    made.add_argument("--seed", type=int, help="Random seed of the bootstrap (0).")
    text = (
        "Tasks of the LM evaluation harness, which requirements-eval.txt brings; offline_arc_easy, offline_hellaswag, "
        "offline_lambada, offline_mmlu, offline_piqa and offline_winogrande need no Hub."
    )
    made.add_argument("--tasks", type=str, nargs="+", default=[], help=text)
    made.add_argument("--limit", type=int, help="Questions of each task; by default all.")
    made.add_argument("--include_path", type=Path, help="A folder of further task files.")
    made.add_argument("--batch_size", type=int, help=f"Requests of a task at once ({BATCH_SIZE}).")
    made.add_argument("--only_tasks", action="store_true", help="Leave the losses out.")
    made.add_loading()
    made.add_compile()
    text = f"The folder for {JSON}, the same as .csv, and the page {HTML}. Default: the run folder, or one beside "
    text += "the checkpoint."
    made.add_argument("--output", type=Path, help=text)
    made.add_argument("--fresh", action="store_true", help="Evaluate again what is in the output already.")
    text = "Do not note the numbers in the checkpoint, where `info` shows them."
    made.add_argument("--leave_checkpoint", action="store_true", help=text)
    made.add_argument("--no_report", action="store_true", help=f"Write no {HTML}.")
    made.add_json()
    return made


def check(options: Any) -> None:
    """Refuse options that are out of range, or have no effect beside the others.

    Raises:
        ValueError: naming one.
    """
    refuse_below_one(options, "tokens", "limit", "batch_size")
    for name in ("budgets", "tasks"):
        twice = [each for each in options[name] if options[name].count(each) > 1]
        if twice:
            raise ValueError(f"--{name} names {twice[0]} twice; leave one out")
    for needed, names in NEEDED.items():
        given = [name for name in names if options[name]]
        if given and not options[needed]:
            raise ValueError(f"--{given[0]} has no effect without --{needed}")
    if options.tasks and find_spec(HARNESS) is None:
        raise ValueError("--tasks needs the LM evaluation harness: pip install -r requirements-eval.txt")
    if options.include_path is not None and not options.include_path.is_dir():
        raise ValueError(f"--include_path must be a folder of task files; there is no folder {options.include_path}")


def prepared(options: Any, args: Sequence[str], location: Location) -> tuple[Evaluation, list[LoadedTask]]:
    """Load what a command line works with; nothing is measured yet.

    Raises:
        ValueError: if the checkpoint is damaged, the output is of another, a budget cannot be met, or there is no such
            task or too little text.
    """
    folder, device = location.checkpoint, device_of(options.device, location.checkpoint)
    sha256, seed = checkpoint.digest(folder), options.seed or 0
    results = Results.read(options.output or default_output(location), sha256, fresh=options.fresh)
    model = FlextronModel.from_pretrained(folder, dtype=getattr(torch, options.dtype), device=device)
    model.compile_widths(options.compile)
    made: Row = {"command": shlex.join(["python", "main.py", "evaluate", *args]), "seed": seed}
    made |= {"checkpoint": sha256, "device": device_description(device), "dtype": options.dtype}
    made |= {"compiled": True} if options.compile else {}
    made |= {"versions": versions(), "git_commit": git_commit(), "date": now()}
    ways = ways_of(model.flextron, options.networks, options.budgets, options.latency)
    # what is wrong is to be told before what takes long: budgets, then tasks, then texts
    answers = routed(model, options.budgets, ways, options.latency)
    tasks = _tasks(options)
    evaluation = Evaluation(
        model=model,
        results=results,
        made=made,
        budgets=options.budgets,
        ways=ways,
        routed=answers,
        latency=options.latency,
        measurement=Measurement(model.backbone, _texts(options, model, ways)),
        seed=seed,
    )
    return evaluation, tasks


def _tasks(options: Any) -> list[LoadedTask]:
    """All tasks with their data."""
    if not options.tasks:
        return []
    from flextron_lit.evaluation.harness import LoadedTask

    return [LoadedTask.load(name, options.include_path) for name in options.tasks]


def _texts(options: Any, model: FlextronModel, ways: Sequence[Way]) -> Texts:
    """What losses are measured on; nothing, where none is."""
    if not options.only_tasks or UNIFORM in ways:
        return texts_of(model.flextron, options.text, options.tokens)
    for name in ("text", "tokens", "seed"):
        if options[name]:
            raise ValueError(f"--{name} has no effect: with --only_tasks no loss of these networks is measured")
    return {}


def command(args: Sequence[str]) -> None:
    """Loss and perplexity of the full network and of what each budget gets, with 95 % intervals; scores on tasks.

    The tasks are those of the LM evaluation harness. Finished parts are not run again. Example: main.py evaluate
    --checkpoint runs/quickstart/static_router --budgets 0.8 0.6
    """
    options = parser().parse_args(list(args))
    check(options)
    location = locate(options.checkpoint)
    evaluation, tasks = prepared(options, args, location)
    results = evaluation.results
    losses = [] if options.only_tasks else evaluation.losses()
    scores = evaluation.scores(tasks, options.limit, options.batch_size or BATCH_SIZE) if tasks else []
    if not options.leave_checkpoint:
        results.note_in(location.checkpoint, evaluation.made)
    if options.json:
        show(json_text({"losses": losses, "tasks": scores}).rstrip())
    else:
        show(*measured.shown(losses), *([scored.shown(scores)] if scores else []), f"wrote {results.path}")
    if not options.no_report:
        texts = evaluation.measurement.texts
        report_evaluation(location, evaluation.model, results, texts, evaluation.latency)
