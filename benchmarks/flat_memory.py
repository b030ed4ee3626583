"""Whether a run's memory stays flat: bytes of tensors and of the process, over 2,000 steps of the debug model.

    OMP_NUM_THREADS=1 python benchmarks/flat_memory.py --steps 2000 --check

`main.py fit` as anybody runs it, with a validation every 50 steps, a table and a saved state behind each, logs, and the
checkpoint at the end: elastic training of a dense model, the same on a stream of text, and a static router that a
surrogate guides, which goes on learning. Every 25 steps all garbage is collected, then counted: tensors that Python
knows of, the process (VmRSS), and Python's objects. What the first quarter of the steps takes (caches of costs and
kernels, arenas of the allocator) is warm-up; compared are the largest of the quarter behind it and of the last one.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from lightning.pytorch import Callback

LIMIT = 0.01
EVERY = 25
WARM = 0.25
"""Share of the steps that are warm-up; as many are compared with as many at the end."""
VALIDATED = {"trainer": {"val_check_interval": 50, "check_val_every_n_epoch": None, "precision": "32-true"}}
SHORT = {"data": {"init_args": {"validation_tokens": 256, "test_tokens": 256}}}
STREAM = {"data": {"init_args": {"streaming": {"lanes": 4, "window": 16, "epoch_tokens": 100_000}}}}
ROUTER = {
    "model": {"init_args": {"cost": "flops"}},
    "trainer": {
        "callbacks": [
            {"class_path": "callbacks.BudgetSampling", "init_args": {"k": 32}},
            {"class_path": "callbacks.SurrogateGuidance", "init_args": {"every_n_steps": 50}},
        ]
    },
}
DEBUG = ["configs/debug.yaml"]
ROUTERS = ["configs/data/generated.yaml", "configs/trainer/cpu.yaml"]
RUNS = {
    "elastic": (DEBUG, [VALIDATED, SHORT]),
    "elastic, streaming": (DEBUG, [VALIDATED, SHORT, STREAM]),
    "static router": (["configs/stages/static_router.yaml", *ROUTERS], [SHORT, VALIDATED, ROUTER]),
}


class Memory(Callback):
    """Notes what there is, every so many steps.

    Args:
        file: where to write it, a row a line.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        # behind validation and save of the step before, and without a graph of this one
        if trainer.global_step % EVERY or not trainer.global_step:
            return
        gc.collect()
        row = {"step": trainer.global_step, "tensors": tensors(), "process": resident()}
        row["objects"] = len(gc.get_objects())
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")


def tensors():
    """Bytes of all storages that a tensor which Python knows of is of."""
    storages = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if each.is_leaf and each.grad is not None:
                storage = each.grad.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident():
    """Bytes of this process that are in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def fit(folder, name, configs, settings, *more):
    """One stage by the command line; its run folder."""
    command = [sys.executable, "main.py", "fit", *(part for each in configs for part in ("-c", each))]
    command += [part for each in settings for part in ("-c", json.dumps(each))]
    run = folder / name.replace(", ", "-").replace(" ", "-")
    done = subprocess.run([*command, "--run_folder", str(run), *more], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return run


def start_of_routers(folder):
    """A checkpoint with a surrogate."""
    quick = ("--trainer.max_steps", "20", "--trainer.val_check_interval", "20")
    elastic = fit(folder, "start", DEBUG, [SHORT], *quick)
    small = {"model": {"init_args": {"tokens": 256, "block_size": 64, "pairs": 64}}, "trainer": {"max_epochs": 5}}
    surrogate = ["configs/stages/surrogate.yaml", *ROUTERS]
    started = ("--model.init_args.checkpoint", str(elastic / "flextron"))
    return fit(folder, "surrogate", surrogate, [SHORT, small], *started) / "flextron"


def main(options):
    flat = True
    print("| run | counted | behind the warm-up | at the end | growth |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run in options.runs:
            file = folder / f"{run}.jsonl"
            memory = json.dumps({"class_path": "benchmarks.flat_memory.Memory", "init_args": {"file": str(file)}})
            more = ["--trainer.max_steps", str(options.steps), "--trainer.callbacks+", memory]
            if "router" in run:
                more += ["--model.init_args.checkpoint", str(start_of_routers(folder))]
            fit(folder, run, *RUNS[run], *more)
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            warm = [row for row in rows if WARM <= row["step"] / options.steps < 2 * WARM]
            late = [row for row in rows if row["step"] / options.steps >= 1 - WARM]
            for counted in ("tensors", "process", "objects"):
                before, after = (max(row[counted] for row in part) for part in (warm, late))
                growth = after / before - 1
                # objects are told: an entry of a table is some, and no bytes to speak of
                flat = flat and (counted == "objects" or growth < LIMIT)
                shown = [f"{each:,}" if counted == "objects" else f"{each / 1e6:.2f} MB" for each in (before, after)]
                print(f"| {run} | {counted} | {shown[0]} | {shown[1]} | {growth:+.2%} |", flush=True)
            if options.rows:
                options.rows.mkdir(parents=True, exist_ok=True)
                (options.rows / file.name).write_text(file.read_text())
    if options.check and not flat:
        raise SystemExit(f"memory grows by more than {LIMIT:.0%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--rows", type=Path, help="a folder to keep what was counted in")
    parser.add_argument("--check", action="store_true", help="exit 1 if bytes grow by more than 1%% behind the warm-up")
    main(parser.parse_args())
