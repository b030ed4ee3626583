"""What budgets keep of a model on tasks: the share of its accuracy above chance, with a paired bootstrap.

    HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 python benchmarks/task_shares.py --checkpoint runs/quickstart/joint_tuning \
      --budgets 0.8 --limit 500

The same questions for all networks, so they are drawn together: an interval is that of a share, not of an accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from lm_eval import evaluate
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent)]
from flextron_lit.evaluation.harness import BudgetedLM, LoadedTask
from flextron_lit.model import FlextronModel

CHANCE = {
    "offline_arc_easy": 0.25,
    "offline_piqa": 0.5,
    "offline_hellaswag": 0.25,
    "offline_lambada": 0.0,
    "offline_winogrande": 0.5,
    "offline_mmlu": 0.25,
}
TASKS = ("offline_arc_easy", "offline_piqa", "offline_hellaswag")
DRAWN = 10_000


def right_answers(lm: BudgetedLM, task: LoadedTask, limit: int) -> np.ndarray:
    """Whether each question was answered right, float64 [questions]."""
    found = evaluate(lm=lm, task_dict=task.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    assert found is not None
    (samples,) = found["samples"].values()
    return np.array([sample["acc"] for sample in sorted(samples, key=lambda each: each["doc_id"])], dtype=np.float64)


def share(small: np.ndarray, full: np.ndarray, chance: float) -> float:
    """Of the accuracy above chance."""
    return float((small.mean() - chance) / (full.mean() - chance))


def interval(pairs: list[tuple[np.ndarray, np.ndarray, float]], generator: np.random.Generator) -> tuple[float, float]:
    """Of the mean share over tasks, 95 %."""
    drawn = []
    for _ in range(DRAWN):
        picks = [generator.integers(0, len(full), len(full)) for _, full, _ in pairs]
        drawn.append(fmean(share(s[p], f[p], c) for (s, f, c), p in zip(pairs, picks, strict=True)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Measure and print."""
    options = parsed()
    torch.set_num_threads(options.threads)
    model = FlextronModel.from_pretrained(options.checkpoint, dtype=getattr(torch, options.dtype))
    lm = BudgetedLM(model, batch_size=8)
    budgets = ["1.0", *options.budgets]
    selections = {budget: model.flextron.answer(budget).sub_network for budget in budgets}
    right: dict[str, dict[str, list[float]]] = {budget: {} for budget in budgets}
    for name in options.tasks:
        task = LoadedTask.load(name, None)
        for budget in budgets:
            with lm.within(selections[budget]):
                right[budget][name] = right_answers(lm, task, options.limit).tolist()
    if options.output:
        options.output.write_text(json.dumps(right))
    table = Table("budget", *(name.removeprefix("offline_") for name in options.tasks), "mean share kept", "95 %")
    for budget in budgets:
        mine = {name: np.array(found) for name, found in right[budget].items()}
        pairs = [(mine[name], np.array(right["1.0"][name]), CHANCE[name]) for name in options.tasks]
        cells = [f"{small.mean():.3f} ({share(small, full, chance):.0%})" for small, full, chance in pairs]
        low, high = interval(pairs, np.random.default_rng(options.seed))
        mean = fmean(share(*pair) for pair in pairs)
        table.add_row(budget, *cells, f"{mean:.1%}", f"{low:.1%} to {high:.1%}")
    Console(width=120).print(table)


def parsed() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", required=True)
    made.add_argument("--budgets", nargs="+", default=["0.8"])
    text = "the full model has to be above chance in each: SmolLM2-135M is not in MMLU"
    made.add_argument("--tasks", nargs="+", choices=list(CHANCE), default=list(TASKS), help=text)
    made.add_argument("--limit", type=int, default=500, help="questions of each task")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    made.add_argument("--output", type=Path, help="every answer as JSON: 1 where it was right")
    return made.parse_args()


if __name__ == "__main__":
    main()
