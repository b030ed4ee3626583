"""A stage that watches the losses of some sub-networks on held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flextron_lit.costs import CostTable
from flextron_lit.losses import cross_entropy
from flextron_lit.space import SubNetwork
from flextron_lit.stages.stage import Batch, Stage
from flextron_lit.validation import LossTable, ValidationResult


class WatchedStage(Stage):
    """Validation, test and prediction over named sub-networks, one loader a text domain."""

    losses: LossTable
    watched: dict[str, SubNetwork]
    watched_costs: CostTable

    def watch(self, sub_networks: Mapping[str, SubNetwork], costs: CostTable) -> None:
        """Name the sub-networks to watch, and the cost to show them by; what a name stands for may change later."""
        self.watched, self.watched_costs = dict(sub_networks), costs
        if not hasattr(self, "losses"):
            # made during a run by stages that know what to watch only then
            self.losses = LossTable(len(self.watched), len(self.domains)).to(self.device)

    @property
    def domains(self) -> list[str]:
        """Names of the text domains, in the order of the validation loaders."""
        return self.text.domain_names

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch of a domain (`dataloader_idx`) for every watched sub-network."""
        for index, sub_network in enumerate(self.watched.values()):
            with self.backbone.use(sub_network):
                total, tokens = cross_entropy(self.logits(batch), batch["labels"])
            self.losses.update(index, dataloader_idx, total, tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the table under stable names, and keep it for callbacks."""
        self._log_table("val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`, on the test documents."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_table("test")

    def _log_table(self, prefix: str) -> None:
        losses = self.losses.compute().cpu()
        self.losses.reset()
        self.result = ValidationResult(self.backbone.space, self.watched_costs, self.watched, self.domains, losses)
        self.log_dict(self.result.metrics(prefix) | {"step": float(self.trainer.global_step)})

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Loss of every watched sub-network on each block of a batch: what `predict` writes, a row a block."""
        rows: dict[str, Any] = {"domain": self.domains[dataloader_idx], "batch": batch_idx, "loss": {}}
        for name, sub_network in self.watched.items():
            with self.backbone.use(sub_network):
                logits = self.logits(batch)
            pairs = [
                cross_entropy(one[None], labels[None]) for one, labels in zip(logits, batch["labels"], strict=True)
            ]
            rows["loss"][name] = [(total / tokens).item() for total, tokens in pairs]
            rows["tokens"] = [int(tokens) for _, tokens in pairs]
        return rows
