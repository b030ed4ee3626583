r"""Whether the full network scores what the harness's own class for Hugging Face models scores on the dense checkpoint.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 python benchmarks/harness_parity.py \
      --checkpoint runs/quickstart/joint_tuning --check

In bfloat16, the same task files and questions. Needs `requirements-eval.txt`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from held_out_text import flextron_folders
from lm_eval.models.huggingface import HFLM

from flextron_lit.evaluation.harness import BudgetedLM, LoadedTask
from flextron_lit.evaluation.offline_tasks import OFFLINE
from flextron_lit.model import FlextronModel

BATCH_SIZE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(OFFLINE))
    parser.add_argument("--limit", type=int, default=500, help="questions of each task")
    parser.add_argument("--softmax_dtype", default="float32", help="of the harness's class; ours is float32")
    parser.add_argument("--check", action="store_true", help="exit 1 if a score differs")
    options = parser.parse_args()
    (folder,) = flextron_folders([options.checkpoint])
    model = FlextronModel.from_pretrained(folder, dtype=torch.bfloat16)
    ours = BudgetedLM(model, BATCH_SIZE)
    how = {"dtype": "bfloat16", "softmax_dtype": options.softmax_dtype, "batch_size": BATCH_SIZE, "device": "cpu"}
    stock = HFLM(pretrained=str(folder), **how)
    differing = []
    for name in options.tasks:
        task = LoadedTask.load(name, None)
        with ours.within(model.backbone.space.full()):
            found = task.scores(ours, options.limit)
        expected = task.scores(stock, options.limit)
        differing += [name] * (found != expected)
        print(f"{name}\n  ours  {found}\n  stock {expected}")
    print(f"{len(options.tasks) - len(differing)} of {len(options.tasks)} tasks: every score is the same")
    if options.check and differing:
        sys.exit(f"scores differ: {', '.join(differing)}")


if __name__ == "__main__":
    main()
