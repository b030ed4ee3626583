"""`python main.py evaluate`: what each budget loses on texts, and scores on tasks of the LM evaluation harness."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.utilities import rank_zero_info

from flextron_lit import checkpoint
from flextron_lit.checkpoint.location import FOLDER_HELP, Location, locate
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.commands.options import add_device, add_latency
from flextron_lit.costs.budget import HELP
from flextron_lit.costs.workload import Dtype
from flextron_lit.evaluation import loss_rows as measured
from flextron_lit.evaluation import task_rows as scored
from flextron_lit.evaluation.loss_rows import Measurement, Row, measure
from flextron_lit.evaluation.networks import WAYS, Network, Way, in_order, routed, uniform, ways_of
from flextron_lit.evaluation.results import HTML, JSON, Results, metrics
from flextron_lit.evaluation.texts import TOKENS, Texts, texts_of
from flextron_lit.files.digest import fingerprint
from flextron_lit.files.provenance import git_commit, now, versions
from flextron_lit.latency.device import device_description
from flextron_lit.latency.device_choice import device_of
from flextron_lit.model import FlextronModel
from flextron_lit.report.assembly import report_evaluation
from flextron_lit.report.reported_folder import Source
from flextron_lit.space import SubNetwork
from flextron_lit.stages.validation import UNIFORM
from flextron_lit.terminal.console import show

if TYPE_CHECKING:
    # an optional extra
    from flextron_lit.evaluation.harness import LoadedTask

HARNESS = "lm_eval"
BATCH_SIZE = 4
"""Requests at once: on one core a third faster than one by one; 16 are no faster, since all logits are kept."""
NEEDED = {"budgets": ("networks", "latency"), "tasks": ("limit", "include_path", "batch_size", "only_tasks")}
"""Options without which others have no effect."""


@dataclass(frozen=True)
class Evaluation:
    """One command line, and what it works with."""

    options: Any
    model: FlextronModel
    results: Results
    made: Row
    """How results are made, JSON-able."""

    ways: Sequence[Way]
    """How budgets are answered."""
    routed: Sequence[Network]
    """What routers answer."""

    @cached_property
    def texts(self) -> Texts:
        """What losses are measured on; nothing, where none is."""
        options = self.options
        if options.only_tasks and UNIFORM not in self.ways:
            for name in ("text", "tokens", "seed"):
                if options[name]:
                    raise ValueError(f"--{name} has no effect: with --only_tasks no loss of these networks is measured")
            return {}
        return texts_of(self.model.flextron, options.text, options.tokens)

    @cached_property
    def measurement(self) -> Measurement:
        """Losses on the texts."""
        return Measurement(self.model.backbone, self.texts)

    @cached_property
    def asked(self) -> Row:
        """What losses depend on beside how they are made."""
        texts = {name: fingerprint(batches) for name, batches in self.texts.items()}
        answers = [{**network.about(), "costs": dict(network.costs)} for network in self.routed]
        asked = {"budgets": self.options.budgets, "networks": list(self.ways), "answers": answers, "texts": texts}
        return {**asked, "limits": self._limits(), "seed": self.options.seed or 0}

    def _limits(self) -> dict[str, dict[str, float]]:
        """What budgets mean to uniform networks, which are chosen by measuring."""
        if UNIFORM not in self.ways:
            return {}
        routing = self.model.flextron.routing(self.options.latency)
        parsed = {budget: routing.parse(budget) for budget in self.options.budgets}
        return {budget: {each.table.name: each.value for each in limits} for budget, limits in parsed.items()}

    @cached_property
    def kept(self) -> list[Row] | None:
        """Rows of losses from an earlier run of the same; None if there are none."""
        return self.results.known_losses(self.made, self.asked)

    @cached_property
    def selected(self) -> list[Network]:
        """All networks, the best uniform ones measured unless an earlier run has."""
        options, answers = self.options, list(self.routed)
        rows = [row for row in self.kept or [] if row["network"] == UNIFORM]
        known = {row["budget"]: SubNetwork.from_json(row["sub_network"]) for row in rows}
        for budget in options.budgets if UNIFORM in self.ways else []:
            score = self.measurement.loss
            answers.append(uniform(self.model, budget, score, options.latency, known.get(budget)))
        return in_order(self.model, options.budgets, answers)

    def losses(self) -> list[Row]:
        """Rows of losses, measured unless an earlier run has."""
        if self.kept is not None:
            rank_zero_info(f"the losses are in {self.results.path} already; --fresh measures again")
            return self.kept
        rows = measure(self.measurement, self.selected, self.asked["seed"])
        self.results.losses = {"made": self.made, "asked": self.asked, "rows": rows}
        self.results.write()
        return rows

    def tasks(self) -> list[LoadedTask]:
        """All tasks with their data, before anything is measured: a wrong name should not cost an hour."""
        if not self.options.tasks:
            return []
        from flextron_lit.evaluation.harness import LoadedTask

        return [LoadedTask.load(name, self.options.include_path) for name in self.options.tasks]

    def scores(self, tasks: Sequence[LoadedTask]) -> list[Row]:
        """Rows of tasks, of which finished ones are not evaluated again."""
        from flextron_lit.evaluation.harness import BudgetedLM

        options = self.options
        lm = BudgetedLM(self.model, options.batch_size or BATCH_SIZE)
        made = {**self.made, "versions": {**self.made["versions"], HARNESS: version(HARNESS)}}
        made |= {"batch_size": lm.asked_batch_size}
        rows = (scored.score(lm, task, self.selected, options.limit, self.results, made) for task in tasks)
        return [row for of_task in rows for row in of_task]


def run_of(location: Location) -> RunFolder | None:
    """The run that wrote a checkpoint, where the checkpoint lies in its folder."""
    if location.run_folder is not None:
        return location.run_folder
    above = RunFolder(location.checkpoint.absolute().parent)
    ours = above.checkpoint.name == location.checkpoint.absolute().name and above.status != "new"
    return above if ours else None


def default_output(location: Location) -> Path:
    """The run folder, or a sibling of a checkpoint that lies in none."""
    run = run_of(location)
    if run is not None:
        return run.path
    return location.checkpoint.with_name(f"{location.checkpoint.absolute().name}-evaluation")


def brief(results: Results) -> Iterator[Row]:
    """The numbers alone, for the checkpoint's record."""
    for row in results.losses["rows"] if results.losses else []:
        yield {**_of(row), "metric": "loss", "text": row["text"], "value": row["loss"]}
    for row in results.tasks:
        for task, of in row["scores"].items():
            values = {metric: value for metric, value in metrics(of).items() if scored.ERROR not in metric}
            yield from ({**_of(row), "metric": m, "text": task, "value": value} for m, value in values.items())


def _of(row: Row) -> Row:
    return {"network": row["network"], "budget": row["budget"]}


# --- the command ------------------------------------------------------------------------------------------------


def parser() -> ArgumentParser:
    """Of the command line."""
    made = ArgumentParser(
        prog="main.py evaluate",
        description="Loss and perplexity of the full network and of what each budget gets, with 95 % intervals; scores "
        "on tasks of the LM evaluation harness. Finished parts are not run again. "
        "Example: main.py evaluate --checkpoint runs/quickstart/static_router --budgets 0.8 0.6",
    )
    made.add_argument("--checkpoint", type=Path, required=True, help=FOLDER_HELP)
    text = f"Each as for generate: {HELP} The full network is always evaluated; default: it alone."
    made.add_argument("--budgets", type=str, nargs="+", default=[], help=text)
    text = (
        "How budgets are answered. static: by the static router, or a search by the surrogate; dynamic: by the dynamic "
        "router; uniform: by the best sub-network with all layers alike. Default: all that the checkpoint can."
    )
    made.add_argument("--networks", nargs="+", choices=WAYS, default=None, help=text)
    text = "Text files to measure losses on. Default: the test documents of the training text."
    made.add_argument("--text", type=Path, nargs="+", default=[], help=text)
    text = f"Tokens of each file or domain ({TOKENS}, or what the smallest domain has)."
    made.add_argument("--tokens", type=int, default=None, help=text)
    made.add_argument("--seed", type=int, default=None, help="Random seed of the bootstrap (0).")
    text = (
        "Tasks of the LM evaluation harness, which requirements-eval.txt brings; offline_arc_easy, offline_piqa and "
        "offline_hellaswag need no Hub."
    )
    made.add_argument("--tasks", type=str, nargs="+", default=[], help=text)
    made.add_argument("--limit", type=int, default=None, help="Questions of each task; by default all.")
    made.add_argument("--include_path", type=Path, default=None, help="A folder of further task files.")
    made.add_argument("--batch_size", type=int, default=None, help=f"Requests of a task at once ({BATCH_SIZE}).")
    made.add_argument("--only_tasks", action="store_true", help="Leave the losses out.")
    add_latency(made)
    add_device(made)
    made.add_argument(
        "--dtype", choices=get_args(Dtype), default="float32", help="Number type of weights and activations."
    )
    text = f"The folder for {JSON}, the same as .csv, and the page {HTML}. Default: the run folder, or one beside "
    text += "the checkpoint."
    made.add_argument("--output", type=Path, default=None, help=text)
    made.add_argument("--fresh", action="store_true", help="Evaluate again what is in the output already.")
    text = "Do not note the numbers in the checkpoint, where `info` shows them."
    made.add_argument("--leave_checkpoint", action="store_true", help=text)
    made.add_argument("--no_report", action="store_true", help=f"Write no {HTML}.")
    made.add_argument("--json", action="store_true", help="Print JSON alone, for scripts.")
    return made


def check(options: Any) -> None:
    """Refuse options that are out of range, or have no effect beside the others.

    Raises:
        ValueError: naming one.
    """
    for name in ("tokens", "limit", "batch_size"):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name} must be 1 or more, not {options[name]}")
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


def evaluation_of(options: Any, args: Sequence[str], location: Location) -> Evaluation:
    """Load what a command line works with.

    Raises:
        ValueError: if the checkpoint is damaged, the output is of another, or a budget cannot be met.
    """
    folder, device = location.checkpoint, device_of(options.device, location.checkpoint)
    sha256 = checkpoint.digest(folder)
    results = Results.read(options.output or default_output(location), sha256, fresh=options.fresh)
    model = FlextronModel.from_pretrained(folder, dtype=getattr(torch, options.dtype), device=device)
    made: Row = {"command": shlex.join(["python", "main.py", "evaluate", *args]), "seed": options.seed or 0}
    made |= {"checkpoint": sha256, "device": device_description(device), "dtype": options.dtype}
    made |= {"versions": versions(), "git_commit": git_commit(), "date": now()}
    # before any text is read: a budget that cannot be met fails at once
    ways = ways_of(model.flextron, options.networks, options.budgets, options.latency)
    answers = routed(model, options.budgets, ways, options.latency)
    return Evaluation(options, model, results, made, ways, answers)


def note(folder: Path, results: Results, made: Row) -> None:
    """Note the numbers in the checkpoint; what was noted of the same file is replaced."""
    noted = {"file": str(results.path.absolute()), "made": made, "results": list(brief(results))}
    try:
        checkpoint.note_evaluation(folder, noted)
    except OSError as error:
        # after what may have been hours: the results are safe in their own file
        rank_zero_info(f"note: cannot note the results in {folder} ({error}); --leave_checkpoint does without")


def report(evaluation: Evaluation, location: Location) -> None:
    """Write the page, and say so. What stands in its way is said: the results are safe in their own file."""
    results, run = evaluation.results, run_of(location)
    path = results.folder / HTML
    source = Source.of(location.checkpoint if run is None else run.path, location.checkpoint, run)
    try:
        report_evaluation(source, evaluation.model, results, evaluation.texts, path, evaluation.options.latency)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        rank_zero_info(f"note: there is no {path}: {error}")
    else:
        rank_zero_info(f"wrote {path}")


def command(args: Sequence[str]) -> None:
    """`python main.py evaluate`."""
    options = parser().parse_args(list(args))
    check(options)
    location = locate(options.checkpoint)
    evaluation = evaluation_of(options, args, location)
    tasks = evaluation.tasks()
    losses = [] if options.only_tasks else evaluation.losses()
    scores = evaluation.scores(tasks) if tasks else []
    results = evaluation.results
    if not options.leave_checkpoint:
        note(location.checkpoint, results, evaluation.made)
    if options.json:
        show(json.dumps({"losses": losses, "tasks": scores}, indent=1))
    else:
        show(*measured.shown(losses), *([scored.shown(scores)] if scores else []), f"wrote {results.path}")
    if not options.no_report:
        report(evaluation, location)
