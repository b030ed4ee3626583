"""A stage that watches the losses of some sub-networks on held-out text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flextron_lit.costs import CostTable
from flextron_lit.losses.by_chunk import cross_entropy, token_cross_entropy
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.routers.ladder import Ladder
from flextron_lit.routers.trained import TrainedDynamicRouter
from flextron_lit.space import SubNetwork
from flextron_lit.stages.base import Stage
from flextron_lit.stages.monitored import check_validated
from flextron_lit.stages.validation import DYNAMIC, FULL, ROUTED, LossTable, ValidationResult, Watched, typical


class WatchedStage(Stage):
    """Validation, test and prediction over named sub-networks, one loader a text domain."""

    losses: LossTable
    watched: dict[str, Watched]

    def watch(self, selections: Mapping[str, SubNetwork | DynamicPolicy], costs: CostTable) -> None:
        """Name what to watch, and the cost to show it by; what a name stands for may change later.

        Args:
            selections: by name, the full network first; a router that chooses for every token has its own cost table.
            costs: what sub-networks cost.
        """
        self.watched = {
            name: Watched(each, costs if isinstance(each, SubNetwork) else each.table)
            for name, each in selections.items()
        }
        if not hasattr(self, "losses"):
            # made during a run by stages that know what to watch only then
            self.losses = LossTable(len(self.watched), len(self.domains), self.backbone.space).to(self.device)

    def watch_answers(self, answers: Mapping[str, SubNetwork | DynamicPolicy], costs: CostTable) -> None:
        """Watch what routers answer, beside the full network and uniform sub-networks; arguments as of `watch`."""
        space = self.backbone.space
        uniform = {each.name: space.uniform(each.mlp, each.attention) for each in typical(space)}
        self.watch({FULL: space.full(), **uniform, **answers}, costs)

    @property
    def domains(self) -> list[str]:
        """What tables and logs call the text domains, in the order of the validation loaders."""
        return self.text.shown_names

    def validation_step(self, batch: Batch | None, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch of a domain (`dataloader_idx`) for every watched sub-network; None where a rank has none."""
        if batch is None:
            self._keep_up(batch_idx, dataloader_idx)
            return
        for index, watched in enumerate(self.watched.values()):
            total, tokens = self.measured(watched.selection, batch)
            self.losses.update(index, dataloader_idx, total, tokens, watched.took(self.backbone.space))

    def _keep_up(self, *turn: int) -> None:
        """Where processes wait for one another at every layer, one without a batch runs as many passes as the others.

        By the same way, for it may be known what a batch loses: so no two of them are alike.
        """
        if self.sharding is None:
            return
        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        batch = {"input_ids": tokens, "position_ids": tokens, "labels": tokens - 100, "turn": torch.tensor(turn)}
        for watched in self.watched.values():
            self.measured(watched.selection, batch)
            # of nobody's text
            watched.took(self.backbone.space)

    def measured(self, selection: SubNetwork | DynamicPolicy, batch: Batch) -> tuple[Tensor, Tensor]:
        """Summed loss in nats of what is selected, and the number of tokens predicted."""
        with self.backbone.use(selection):
            return cross_entropy(self.predictions(batch), batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the table under stable names, and keep it for callbacks."""
        self._log_table("val")

    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_table("test")

    def _log_table(self, prefix: str) -> None:
        losses, shares = (each.cpu() for each in self.losses.compute())
        self.losses.reset()
        # torchmetrics makes a plain number of a table with a single entry
        losses = losses.reshape(len(self.watched), len(self.domains))
        self.result = ValidationResult(self.backbone.space, self.watched, self.domains, losses, shares)
        metrics = self.result.metrics(prefix)
        if self.trainer.sanity_checking:
            # before the first step, when nothing is lost yet
            check_validated(self.trainer.callbacks, metrics)  # type: ignore[attr-defined]
        self.log_dict(metrics | {"step": float(self.trainer.global_step)})

    def predict_step(self, batch: Batch | None, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Loss of every watched sub-network on each block of a batch: what `predict` writes, a row a block."""
        if batch is None:
            self._keep_up(batch_idx, dataloader_idx)
            return {}
        rows: dict[str, Any] = {"domain": self.domains[dataloader_idx], "batch": batch_idx, "loss": {}}
        for name, watched in self.watched.items():
            with self.backbone.use(watched.selection):
                losses, counted = token_cross_entropy(self.predictions(batch), batch["labels"])
            tokens = counted.sum(1)
            rows["loss"][name] = (losses.sum(1) / tokens).tolist()
            rows["tokens"] = tokens.tolist()
        return rows


def check_budgets(budgets: list[float] | None) -> None:
    """Refuse budgets that are no ratios.

    Raises:
        ValueError: naming the first.
    """
    wrong = [budget for budget in budgets or () if not 0 < budget <= 1]
    if wrong:
        raise ValueError(f"a budget is a ratio of the full network's cost, above 0 and at most 1, not {wrong[0]}")


def ladder_answers(ladder: Ladder, table: CostTable, budgets: Sequence[float]) -> dict[str, SubNetwork]:
    """What a static router answers to budgets, by the name that it is watched under."""
    names = _names(ROUTED, budgets)
    return {name: ladder.at(b * table.full).sub_network for name, b in zip(names, budgets, strict=True)}


def dynamic_answers(
    router: TrainedDynamicRouter, budgets: Sequence[float], model: PreTrainedModel
) -> dict[str, DynamicPolicy]:
    """What a dynamic router chooses by at budgets, where a model runs, by the name that it is watched under."""
    policies = (router.policy([b], device=model.device, dtype=model.dtype) for b in budgets)
    return dict(zip(_names(DYNAMIC, budgets), policies, strict=True))


def _names(kind: str, budgets: Sequence[float]) -> list[str]:
    """With two decimals, and with more where two budgets would have one name."""
    short = [f"{budget:.2f}" for budget in {*budgets}]
    return [kind + (name if short.count(name := f"{b:.2f}") == 1 else str(b)) for b in budgets]


def budgets_to_watch(wanted: list[float] | None, table: CostTable, lowest: float | None = None) -> list[float]:
    """Budgets at which a router is validated.

    Args:
        wanted: those asked for; None means up to four tenths that can be met.
        table: what they are ratios of.
        lowest: the lowest that can be met; None means what the smallest sub-network costs.

    Raises:
        ValueError: if one of them cannot be met.
    """
    lowest = table.smallest_ratio if lowest is None else lowest
    if wanted is None:
        return [tenth / 10 for tenth in range(9, 0, -1) if tenth / 10 > lowest][:4]
    if wanted and min(wanted) < lowest:
        raise ValueError(
            f"no sub-network meets the budget {min(wanted)}: the smallest {table.name} possible is "
            f"{lowest:.3f} of the full network's"
        )
    return wanted
