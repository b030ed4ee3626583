"""What budgets keep of a model on tasks: the share of its accuracy above chance, with a paired bootstrap.

    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 python benchmarks/task_shares.py --checkpoint runs/quickstart/joint_tuning \
      --budgets 0.8 --limit 500

The same questions for all networks, so they are drawn together: an interval is that of a share, not of an accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from lm_eval import evaluate
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import first_look
from above_chance import CHANCE, FULL, interval, pairs, share
from kept_results import about

from flextron_lit.evaluation.harness import BudgetedLM, LoadedTask
from flextron_lit.files.whole_file import write_json
from flextron_lit.model import FlextronModel
from flextron_lit.space import SubNetwork

TASKS = ("offline_arc_easy", "offline_piqa", "offline_hellaswag")
QUICK = {"limit": 4, "results": Path("build/quick/tasks.json")}
"""Settings of a first look."""


def right_answers(lm: BudgetedLM, task: LoadedTask, limit: int) -> np.ndarray:
    """Whether each question was answered right, float64 [questions]."""
    found = evaluate(lm=lm, task_dict=task.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None
    (samples,) = found["samples"].values()
    return np.array([sample["acc"] for sample in sorted(samples, key=lambda each: each["doc_id"])], dtype=np.float64)


class Answers:
    """What is known of who answered what right, written down as it comes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        file: Path | None = options.results
        found = json.loads(file.read_text()) if file and file.is_file() else {"limit": options.limit, "right": {}}
        if found["limit"] != options.limit:
            sys.exit(f"{file} has {found['limit']} questions of each task, not {options.limit}; give another --results")
        self.right: dict[str, dict[str, str]] = found["right"]
        """A digit a question, by network and task: 1 where the answer was right."""

    def of(self, name: str, lm: BudgetedLM, sub_network: SubNetwork, tasks: Iterable[LoadedTask]) -> None:
        """Ask a network what it was not asked yet."""
        known = self.right.setdefault(name, {})
        for task in tasks:
            if task.name not in known:
                with lm.within(sub_network):
                    right = right_answers(lm, task, self.options.limit)
                known[task.name] = "".join("1" if each else "0" for each in right)
                print(f"{name}, {task.name}: {right.mean():.3f}", flush=True)
                self.write()

    def write(self) -> None:
        if self.options.results:
            found = {"limit": self.options.limit, "dtype": self.options.dtype, "right": self.right, "about": about()}
            write_json(self.options.results, found)


def ask(options: argparse.Namespace) -> Answers:
    """All networks all tasks."""
    answers, dtype = Answers(options), getattr(torch, options.dtype)
    tasks = [LoadedTask.load(name, None) for name in options.tasks]
    model = FlextronModel.from_pretrained(options.checkpoint, dtype=dtype)
    lm = BudgetedLM(model, batch_size=8)
    for budget in [FULL, *options.budgets]:
        answers.of(budget, lm, model.flextron.answer(budget).sub_network, tasks)
    for name, _, folder in (each.rpartition("=") for each in options.others):
        other = FlextronModel.from_pretrained(folder, dtype=dtype)
        answers.of(name, BudgetedLM(other, batch_size=8), other.backbone.space.full(), tasks)
    return answers


def main() -> None:
    """Measure and print."""
    options = parsed()
    torch.set_num_threads(options.threads)
    answers = ask(options)
    table = Table("network", *(name.removeprefix("offline_") for name in options.tasks), "mean share kept", "95 %")
    for name in answers.right:
        if not set(options.tasks) <= answers.right[name].keys():
            # of an earlier call, with fewer tasks
            continue
        answered = pairs(answers.right, name, options.tasks)
        cells = [f"{small.mean():.3f} ({share(small, full, chance):.0%})" for small, full, chance in answered]
        low, high = interval(answered, np.random.default_rng(options.seed))
        mean = fmean(share(*each) for each in answered)
        table.add_row(name, *cells, f"{mean:.1%}", f"{low:.1%} to {high:.1%}")
    Console(width=140).print(table)


def parsed() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", required=True)
    made.add_argument("--budgets", nargs="*", default=["0.8"])
    made.add_argument("--others", nargs="*", default=[], metavar="NAME=FOLDER", help="dense networks beside it")
    text = "the full model has to be above chance in each: SmolLM2-135M is not in MMLU"
    made.add_argument("--tasks", nargs="+", choices=list(CHANCE), default=list(TASKS), help=text)
    made.add_argument("--limit", type=int, default=500, help="questions of each task")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    made.add_argument("--results", type=Path, help="every answer as JSON; what it has is not asked again")
    return first_look.parsed(made, QUICK, "four questions, elsewhere")


if __name__ == "__main__":
    main()
