"""Whether two processes train what one does with all of a batch: every stage, by ddp and fsdp2, step by step.

    OMP_NUM_THREADS=1 python benchmarks/ranks_equal.py --steps 50 --check

One process trains on all blocks of a batch; two of torchrun on half of them each, on one machine, and as two machines
of one process (`--layouts`). The backbone computes in float64, so that no hard choice of a router tips over. Compared
are the plans, the sub-networks that a surrogate learned from, the losses of every step and of every validation, all
weights, and those of them that narrower widths have of their own. The `control` leaves out what makes processes train
together.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch

from tests.ranks import free_port
from tests.stages import together

CLOSE = 1e-5
FAR = 1e-3
ONE, TWO = (("--nnodes", "1", "--nproc_per_node", "2"), ("--nnodes", "2", "--nproc_per_node", "1"))
LAYOUTS = {"processes": ONE, "machines": TWO, "control": ONE}


def train_together(options):
    """Of one of two processes: every stage that is asked for."""
    torch.set_num_threads(1)
    jobs = list(product(options.strategies, options.stages))
    settings = how(options) | {"nodes": 2 if options.train == "machines" else 1}
    if options.train == "control":
        with together.unnoticed():
            together.compare(options.folder, options.checkpoint, jobs, **settings)
    else:
        together.compare(options.folder, options.checkpoint, jobs, **settings)


def how(options):
    return {"before": False, "max_steps": options.steps, "val_check_interval": max(1, options.steps // 2)}


def launch(options, train, start, folder):
    """Two processes, by one torchrun or by two; their logs are in the folder."""
    folder.mkdir()
    layout = LAYOUTS[train]
    command = [sys.executable, "-m", "torch.distributed.run", *layout, "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(free_port())]
    program = [
        __file__,
        "--train",
        train,
        "--checkpoint",
        start,
        "--folder",
        str(folder),
        "--steps",
        str(options.steps),
    ]
    program += ["--stages", *options.stages, "--strategies", *options.strategies]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    nodes = []
    for node in range(2 if train == "machines" else 1):
        with (folder / f"node{node}.log").open("w") as log:
            place = [*command, "--node_rank", str(node), *program]
            nodes.append(subprocess.Popen(place, env=environment, stdout=log, stderr=subprocess.STDOUT))
    codes = [node.wait() for node in nodes]
    if any(codes):
        raise SystemExit("\n".join((folder / f"node{node}.log").read_text()[-4000:] for node in range(len(nodes))))


def far(wanted, found):
    """Largest differences of the losses of steps, those of validations, all weights, and own projections."""
    steps = together.of_all(found)
    assert [each.keys() for each in steps] == [losses.keys() for _, losses in wanted["steps"]]
    step = [
        abs(ours[name] - losses[name])
        for ours, (_, losses) in zip(steps, wanted["steps"], strict=True)
        for name in losses
    ]
    validated = [
        (ours - theirs).abs().max().item() for ours, theirs in zip(found[0]["losses"], wanted["losses"], strict=True)
    ]
    weights = {name: (found[0]["weights"][name] - each).abs().max().item() for name, each in wanted["weights"].items()}
    own = [value for name, value in weights.items() if "compensation" in name and "frozen" not in name]
    return max(step), max(validated, default=None), max(weights.values()), max(own, default=None)


def row(wanted, found):
    """What is shown of one run, and whether it ended as it should."""
    if found[0]["error"]:
        return found[0]["error"], False
    same = all(each[name] == wanted[name] for each in found for name in ("plans", "measured"))
    values = far(wanted, found)
    shown = " | ".join("" if value is None else f"{value:.1e}" for value in values)
    return f"{'yes' if same else 'NO'} | {shown}", same and all(value is None or value < CLOSE for value in values)


def main(options):
    right = True
    print(
        "| family | stage | strategy | on | same sub-networks | step losses | validation | weights | own projections |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for family in options.families:
            folder = Path(name, family)
            os.environ["FLEXTRON_CACHE"] = str(folder / "cache")
            start = together.prepared(together.dense(family, folder / "dense"), folder)
            wanted = {
                each: together.trained(getattr(together, each), start, folder / each, **how(options))
                for each in options.stages
            }
            for train in options.layouts:
                there = folder / f"of-{train}"
                launch(options, train, start, there)
                for stage, strategy in product(options.stages, options.strategies):
                    names = [there / f"{strategy}-{stage}-rank{rank}.pt" for rank in range(2)]
                    found = [torch.load(each, weights_only=False) for each in names]
                    shown, fine = row(wanted[stage], found)
                    if train == "control":
                        # where all compute the same there is nothing to leave out
                        fine = stage in together.ALIKE or far(wanted[stage], found)[2] > FAR
                    right = right and fine
                    print(
                        f"| {family} | {stage} | {strategy} | {train} | {shown} |{'' if fine else ' WRONG'}", flush=True
                    )
    if options.check and not right:
        raise SystemExit(f"a difference is above {CLOSE:g}, or the control ends as it should not")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--families", nargs="+", default=together.FAMILIES, choices=together.FAMILIES)
    parser.add_argument("--stages", nargs="+", default=together.STAGES, choices=together.STAGES)
    parser.add_argument("--strategies", nargs="+", default=["ddp", "fsdp2"], choices=["ddp", "fsdp2"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS))
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a difference is too large, or the control's small"
    )
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    train_together(options) if options.train else main(options)
