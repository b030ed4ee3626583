"""Runs that one process makes with all of a batch, and two with half of it each: what they end with, to compare."""

import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from flextron_lit import callbacks
from flextron_lit.elastic.sharding import whole
from flextron_lit.stages import (
    DynamicRouterTraining,
    ElasticTraining,
    JointTuning,
    Remeasuring,
    StaticRouterTraining,
    SurrogateTraining,
)
from flextron_lit.stages.objective import Distillation
from tests.stages.training import text

STEPS = 4
BATCH = 4
"""Blocks of a step, of all processes."""


def adamw(parameters):
    # so large that steps on other gradients lead elsewhere
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)


def elastic(start, **settings):
    distilled = Distillation(full_from_original=0.5, sampled_from_full=0.5)
    defaults = {"distillation": distilled, "accumulate": 2, "clip_norm": 0.5, "optimizer": adamw}
    return ElasticTraining(start, **(defaults | settings)), [callbacks.BudgetSampling(k=2)]


def compensation(start):
    return elastic(start, trained="compensation", distillation=Distillation(sampled_from_full=1.0))


def checkpointed(start):
    return elastic(start, activation_checkpointing=True)


def surrogate(start):
    sizes = {"pairs": 9, "held_out": 4, "tokens": 64, "block_size": 32, "batch_size": 4}
    return SurrogateTraining(start, **sizes), []


def static(start):
    stage = StaticRouterTraining(start, cost="flops")
    guidance = callbacks.SurrogateGuidance(every_n_steps=1, pairs=3, window=4, threshold=1e9)
    return stage, [callbacks.BudgetSampling(k=2), guidance]


def through_backbone(start):
    stage = StaticRouterTraining(start, cost="flops", through_backbone=True)
    return stage, [callbacks.BudgetSampling(k=2)]


def dynamic(start):
    small = {"cost": "flops", "block_size": 32, "batch_size": 4, "calibration_tokens": 96, "prices": 2}
    return DynamicRouterTraining(start, **small), [callbacks.BudgetSampling(k=2)]


def joint(start, router="static", **settings):
    small = Remeasuring(candidates=5, tokens=96, block_size=32)
    stage = JointTuning(
        start, router=router, cost="flops", optimizer=adamw, clip_norm=0.5, remeasuring=small, **settings
    )
    return stage, [callbacks.BudgetSampling(k=2)]


def both_routers(start):
    return joint(start, "both")


def drawn_widths(start):
    return joint(start, "both", train_router=False)


class Notes(Callback):
    """The plan of every step, and the losses of every validation."""

    def __init__(self):
        self.plans, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.plans.append([getattr(each, "choices", each) for each in pl_module.plan])

    def on_validation_end(self, trainer, pl_module):
        if pl_module.result is not None:
            self.losses.append(pl_module.result.losses)


def trained(made, start, folder, strategy="auto", world=1, **settings):
    """What a run ends with: plans, losses, and every weight as a whole."""
    stage, others = made(start)
    notes = Notes()
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        default_root_dir=folder,
        callbacks=[*others, notes, callbacks.FlextronCheckpointWriter()],
        **(
            {
                "precision": "64-true",
                "max_steps": STEPS,
                "logger": False,
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "val_check_interval": 2,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": -1,
            }
            | settings
        ),
    )
    data = stage.attach(text(tokenizer=start, batch_size=BATCH // world, validation_tokens=160))
    if isinstance(stage, DynamicRouterTraining):
        stage.options.__dict__["batch_size"] = BATCH // world
    trainer.fit(stage, datamodule=data)
    weights = {name: whole(p.detach()).clone() for name, p in stage.named_parameters()}
    weights |= {f"frozen.{n}": whole(p.detach()) for n, p in stage.backbone.model.named_parameters()}
    return {"plans": notes.plans, "losses": notes.losses, "weights": weights}


def both(folder, start, names):
    """Of two processes: train by every strategy."""
    for strategy in ("ddp", "fsdp2"):
        # losses that are known are not measured
        os.environ["FLEXTRON_CACHE"] = str(Path(folder, strategy, "cache"))
        for name in names:
            found = trained(globals()[name], start, Path(folder, strategy, name), strategy, 2)
            if torch.distributed.get_rank() == 0:
                torch.save(found, Path(folder, f"{strategy}-{name}.pt"))
