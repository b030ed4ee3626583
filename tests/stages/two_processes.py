"""Run by test_data_parallel.py in a process of its own: two gloo ranks train three steps and compare notes."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback, Trainer
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[2]))
from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.space import SpaceConfig, SubNetwork
from flextron_lit.stages import Calibration, ElasticTraining
from tests.stages.training import sum_of_losses

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
        self.inputs = batch
        self.batch = batch["input_ids"].sum()
        # what one process would compute with, before the update
        self.alone = copy.deepcopy(pl_module.backbone)

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
                **self.against_one_process(pl_module),
                "gradients_equal": same(gradients),
                "gradient_norm": gradients.norm().item(),
                "batches_equal": same(self.batch),
                "plan": [s.to_json() for s in pl_module.plan],
            }
        )
        self.reductions = 0

    def against_one_process(self, pl_module):
        """Largest differences to gradients of one process that sees both ranks' text, and to those of this rank's."""
        inputs = {name: gathered(tensor) for name, tensor in self.inputs.items()}
        batches = [{name: both[rank] for name, both in inputs.items()} for rank in range(2)]
        found = {name: p.grad for name, p in pl_module.model.named_parameters() if p.grad is not None}
        differences = []
        for seen in (batches, [self.inputs]):
            alone = SimpleNamespace(backbone=self.alone, model=self.alone.model, zero_grad=self.alone.model.zero_grad)
            wanted = sum_of_losses(alone, seen, pl_module.plan)
            assert {name for name, gradient in wanted.items() if gradient is not None} == found.keys()
            differences.append({name: (found[name] - wanted[name]).abs().max().item() for name in found})
        together, own = differences
        return {
            "one_process": max(together.values()),
            "one_process_own": max(value for name, value in together.items() if "compensation" in name),
            "other_text": max(value for name, value in own.items() if "compensation" in name),
        }

    def on_train_end(self, trainer, pl_module):
        weights = torch.cat([p.detach().flatten() for p in pl_module.model.parameters()])
        self.rows.append({"weights_equal": same(weights)})


def gathered(tensor):
    both = [torch.empty_like(tensor) for _ in range(2)]
    distributed.all_gather(both, tensor.contiguous())
    return both


def same(tensor):
    return torch.equal(*gathered(tensor))


def main(folder):
    domains = {"stories": TextDomain(source="generated:60,0")}
    data = TextDataModule(domains, tokenizer=TINY, block_size=32, batch_size=2, validation_tokens=64, test_tokens=64)
    stage = ElasticTraining(
        TINY,
        space=SpaceConfig(mlp=[0, 32, 64, 128], attention=[0, 1, 2, 4]),
        calibration=Calibration(tokens=128, excess_tokens=64),
        clip_norm=1e9,
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
