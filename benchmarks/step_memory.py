"""Peak memory of one step of elastic training, as losses stand whole or by chunks, and what else saves memory.

    OMP_NUM_THREADS=1 python benchmarks/step_memory.py --checkpoint runs/converted --batch_size 4 --block_size 512

A step is the stage's own: the full network and one sampled sub-network, forward and backward, distilled from the full
one, and an update. Bytes are those of tensors (torch's memory tracker), with the process's peak beside them; each row
is a process of its own. Only ratios and losses mean something on another machine.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from pathlib import Path

import torch
from bitsandbytes.optim import AdamW8bit
from lightning.pytorch import Callback, Trainer

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from bare_trainer import BARE
from tensor_bytes import Bytes, keep_states

from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.stages import Calibration, Distillation, ElasticTraining

ADAMW, ADAMW_8BIT = torch.optim.AdamW, AdamW8bit
ROWS = {
    "all logits at once (before)": ({"loss_chunk": 0}, ADAMW),
    "losses by chunks (the default)": ({}, ADAMW),
    "and activations recomputed": ({"activation_checkpointing": True}, ADAMW),
    "and an 8-bit optimizer": ({"activation_checkpointing": True}, ADAMW_8BIT),
}


class Tracked(Callback):
    """Tracks a step, with what an optimizer keeps from the steps before."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.plan = [pl_module.backbone.space.uniform(0.5, 1.0)]
        keep_states(trainer.optimizers)
        self.tracker = Bytes()
        self.tracker.track_external(pl_module.model, *trainer.optimizers, *batch.values())
        self.tracker.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.tracker.__exit__(None, None, None)
        self.peak = {str(getattr(kind, "value", kind)): size for kind, size in self.tracker.peak().items()}
        metrics = trainer.callback_metrics
        self.losses = [float(metrics[f"train/{name}"]) for name in ("full/loss", "sampled/loss", "sampled/kl_full")]


def step(name, options, results):
    settings, optimizer = ROWS[name]
    text = TextDataModule(
        {"docs": TextDomain(source="python:")},
        options.checkpoint,
        block_size=options.block_size,
        batch_size=options.batch_size,
        validation_tokens=options.block_size,
        test_tokens=options.block_size,
    )
    stage = ElasticTraining(
        options.checkpoint,
        lambda parameters: optimizer(parameters, lr=1e-5, weight_decay=0.0),
        calibration=Calibration(tokens=0),
        distillation=Distillation(sampled_from_full=0.5),
        **settings,
    )
    tracked = Tracked()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(**BARE, precision=options.precision, callbacks=[tracked], default_root_dir=folder)
        stage.attach(text)
        trainer.fit(stage, datamodule=text)
    status = Path("/proc/self/status").read_text().splitlines()
    process = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024
    results.put({"name": name, "losses": tracked.losses, "peak": tracked.peak, "process": process})


def main(options):
    spawned = multiprocessing.get_context("spawn")
    found = []
    for name in ROWS:
        results = spawned.Queue()
        process = spawned.Process(target=step, args=(name, options, results))
        process.start()
        while process.is_alive() and results.empty():
            process.join(0.5)
        found.append(results.get(timeout=5))
        process.join()
        row, first = found[-1], found[0]
        total, process_total = row["peak"]["Total"], row["process"]
        parts = ", ".join(f"{kind} {size / 2**20:.0f}" for kind, size in row["peak"].items() if size)
        worst = max(abs(one - other) for one, other in zip(row["losses"], first["losses"], strict=True))
        print(
            f"{name}: tensors {total / first['peak']['Total']:.3f} of the first row's, process "
            f"{process_total / first['process']:.3f} (MiB at the peak: {parts}; process {process_total / 2**20:.0f}); "
            f"losses differ by {worst:.1e}",
            flush=True,
        )
    if options.output:
        Path(options.output).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="a converted network")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--block_size", type=int, default=512)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--output", default=None, help="where all of it is written as JSON")
    main(parser.parse_args())
