"""Tuning a small dense model towards the original, on the text and by the losses that elastic training has here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bare_trainer import BARE
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from flextron_lit.commands.fit import best_precision
from flextron_lit.data import TextDataModule
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.by_chunk import Predictions, losses
from flextron_lit.losses.measured_loss import INPUTS
from flextron_lit.stages.written_batches import WrittenBatches

Batch = Mapping[str, Tensor]
WRITTEN = 0.5
"""Share of the batches that the original writes itself, as the quickstart has it."""
WARM_UP = 0.1
"""Share of the steps; the learning rate then falls to nothing."""


def training_text(original: PreTrainedModel, text: TextDataModule, steps: int) -> list[Batch]:
    """The batches that every way is tuned on."""
    written = WrittenBatches.write(ElasticBackbone(original), WRITTEN, steps, text.block_size)
    loaded = iter(text.train_dataloader())
    return [written.instead(next(loaded), number) for number in range(steps)]


def inputs_of(batch: Batch) -> dict[str, Tensor]:
    return {name: batch[name] for name in INPUTS if name in batch}


@torch.no_grad()
def taught(original: PreTrainedModel, batches: Sequence[Batch]) -> list[Predictions]:
    """What the original says of every batch: hidden states, which stay in memory for all ways."""
    found = [Predictions.of(original, inputs_of(batch)) for batch in batches]
    return [Predictions(each.hidden.detach(), each.head, each.chunk) for each in found]


class Tuning(LightningModule):
    """Language loss and distillation from the original, all weights."""

    def __init__(self, model: PreTrainedModel, teacher: Sequence[Predictions], learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        # not a module: it does not train
        self.teacher = [teacher]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        own = Predictions.of(self.model, inputs_of(batch))
        language, distilled = losses(own, batch["labels"], {"original": self.teacher[0][batch_idx]})
        return language + distilled["original"]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        warm = math.ceil(WARM_UP * steps)
        falling = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": falling, "interval": "step"}}


def tune(
    model: PreTrainedModel, batches: Sequence[Batch], teacher: Sequence[Predictions], learning_rate: float
) -> None:
    """One step a batch, in place."""
    settings = BARE | {"max_steps": len(batches), "gradient_clip_val": 1.0, "precision": best_precision()}
    loader: DataLoader[Batch] = DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]
    model.train()
    Trainer(**settings).fit(Tuning(model, teacher, learning_rate), loader)
    model.eval()
