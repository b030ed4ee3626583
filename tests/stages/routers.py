"""What tests of router stages share: a run in process, and what it did to router and surrogate step by step."""

from itertools import pairwise

import torch
from lightning.pytorch import Callback, Trainer

from tests.stages.training import text


def trainer_of(folder, *callbacks, **settings):
    return Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **({"accelerator": "cpu", "limit_val_batches": 0} | settings),
    )


def fit(stage, folder, *callbacks, **settings):
    trainer = trainer_of(folder, *callbacks, **settings)
    stage.attach(text(tokenizer=stage.checkpoint))
    trainer.fit(stage)
    return trainer


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class Watch(Callback):
    """The weights of router and surrogate, and whether the gate was open, step by step."""

    def __init__(self):
        self.open, self.router, self.surrogate = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.open.append(pl_module.router_moves)
        self.router.append(flat(pl_module.router))
        if hasattr(pl_module, "surrogate"):
            self.surrogate.append(flat(pl_module.surrogate))


def moved(values):
    return [not torch.equal(before, after) for before, after in pairwise(values)]
