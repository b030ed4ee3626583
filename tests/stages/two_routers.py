"""Run by test_dynamic_router.py in a process of its own: two gloo ranks train a dynamic router."""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback

sys.path.insert(0, str(Path(__file__).parents[2]))
from flextron_lit import callbacks
from flextron_lit.stages import DynamicRouterTraining
from tests.stages.routers import fit, flat


class Batches(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch["input_ids"]


def main(checkpoint, folder, guidance):
    small = {"cost": "flops", "block_size": 32, "batch_size": 4, "calibration_tokens": 256}
    stage = DynamicRouterTraining(checkpoint, guidance=guidance, **small)
    batches = Batches()
    added = [callbacks.BudgetSampling(k=2), batches]
    if guidance != "backbone":
        added.append(callbacks.SurrogateGuidance(every_n_steps=1, pairs=64, window=64, threshold=1e9))
    trainer = fit(stage, folder, *added, max_steps=4, devices=2, strategy="ddp", use_distributed_sampler=False)
    remembered = {} if guidance == "backbone" else stage.guide.memory.columns
    notes = {
        "weight": stage.router.weight.detach(),
        "bias": stage.router.bias.detach(),
        "surrogate": torch.empty(0) if guidance == "backbone" else flat(stage.surrogate),
        "memory": remembered.get("target", torch.empty(0)),
        "prices": stage.prices.to_json(),
        "batch": batches.batch,
        "moves": stage.moves,
    }
    torch.save(notes, Path(folder) / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
