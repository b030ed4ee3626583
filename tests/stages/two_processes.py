"""Run by test_data_parallel.py in a process of its own: two gloo ranks train three steps and compare notes."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[2]))
from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages import Calibration, ElasticTraining

TINY = "random:" + str(Path(__file__).parents[2] / "configs/models/tiny-llama")


class SkippingPlan(Callback):
    """Sub-networks that skip blocks, where data parallelism would miss gradients."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.plan = [SubNetwork((2, 0, 0, 3, 1, 0)), pl_module.backbone.space.smallest()]


class Notes(Callback):
    """Compares gradients and weights of both ranks, and counts reductions."""

    def __init__(self):
        self.reductions = 0
        self.rows = []

    def on_fit_start(self, trainer, pl_module):
        def count(_, bucket):
            self.reductions += 1
            self.parameters = self.parameters + len(bucket.parameters()) if bucket.index() else len(bucket.parameters())
            work = distributed.all_reduce(bucket.buffer() / 2, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        trainer.strategy.model.register_comm_hook(None, count)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batch = batch["input_ids"].sum()

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        backbone = pl_module.backbone
        gradients = torch.cat([p.grad.flatten() for p in backbone.parameters.values()])
        drawn = {name: p.grad for name, p in backbone.compensations.items() if p.grad is not None}
        self.rows.append(
            {
                "reductions": self.reductions,
                "parameters_reduced": self.parameters,
                "parameters": len(backbone.parameters),
                "drawn": sorted(drawn),
                "drawn_equal": all(same(gradient) for gradient in drawn.values()),
                "gradients_equal": same(gradients),
                "gradient_norm": gradients.norm().item(),
                "batches_equal": same(self.batch),
                "plan": [s.to_json() for s in pl_module.plan],
            }
        )
        self.reductions = 0

    def on_train_end(self, trainer, pl_module):
        weights = torch.cat([p.detach().flatten() for p in pl_module.model.parameters()])
        self.rows.append({"weights_equal": same(weights)})


def same(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(gathered, tensor)
    return torch.equal(*gathered)


def main(folder):
    domains = {"stories": TextDomain(source="generated:60,0")}
    data = TextDataModule(domains, tokenizer=TINY, block_size=32, batch_size=2, validation_tokens=64, test_tokens=64)
    stage = ElasticTraining(
        TINY,
        space=SpaceConfig(mlp=[0, 32, 64, 128], attention=[0, 1, 2, 4]),
        calibration=Calibration(tokens=128),
    )
    notes = Notes()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=0,
        use_distributed_sampler=False,
        callbacks=[SkippingPlan(), notes],
        default_root_dir=folder,
    )
    trainer.fit(stage, datamodule=data)
    (Path(folder) / f"rank{trainer.global_rank}.json").write_text(json.dumps(notes.rows))


if __name__ == "__main__":
    main(sys.argv[1])
