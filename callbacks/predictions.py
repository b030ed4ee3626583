from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from flextron_lit.files.whole_file import json_text, write_text


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict` found to `<run folder>/predictions.jsonl`, a row a batch; one file a rank."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Write all rows at once."""
        loaders = predictions if predictions and isinstance(predictions[0], list) else [predictions]
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        found = (row for loader in loaders for row in loader if row)
        write_text(path, "".join(json_text(row, indent=None) for row in found))
        rank_zero_info(f"wrote {path}")
