"""Stage 2: the surrogate learns the language loss from choices (paper, surrogate model)."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.regression import mean_absolute_error, spearman_corrcoef

from flextron_lit.costs.sub_network_sampling import stratified
from flextron_lit.data.loader import ResumableLoader
from flextron_lit.files.places import SURROGATE
from flextron_lit.routers.pairs import Pairs, draw
from flextron_lit.routers.staleness import measured_files
from flextron_lit.routers.surrogate import TARGETS, Surrogate, Target, ridge
from flextron_lit.routers.trained import TrainedSurrogate
from flextron_lit.stages.frozen_stage import FrozenSettings, FrozenStage


@dataclass(frozen=True, kw_only=True)
class SurrogateSettings(FrozenSettings):
    """What training a surrogate can be told."""

    pairs: int = 200
    """Sub-networks to learn from."""
    held_out: int = 40
    """Further ones to check with."""
    tokens: int = 1536
    """Training tokens that each loss is measured on."""
    block_size: int = 256
    """Tokens of a block: short ones show more documents."""
    measure_batch_size: int = 4
    """Blocks that run at once."""
    cost: str = "parameters"
    """What the sub-networks are spread over: `parameters`, `flops`, or with LatencyProfiling `latency`."""
    target: Target = "log_excess"
    """`log_excess` (ours) or `loss` (paper) is predicted."""
    hidden: int = 64
    """Width of the surrogate's MLP."""
    batch_size: int = 32
    """Pairs of a step."""
    seed: int = 0
    """Of the draws and the first weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in TARGETS:
            raise ValueError(f"target is one of {', '.join(TARGETS)}, not {self.target!r}")
        if self.pairs < self.batch_size or self.held_out < 2 or self.batch_size < 1:
            raise ValueError(
                f"a surrogate needs at least one batch of pairs and 2 held-out ones, not {self.pairs} pairs in batches "
                f"of {self.batch_size} and {self.held_out} held out"
            )
        self.check_counts("tokens", "block_size", "measure_batch_size", "hidden")


class SurrogateTraining(FrozenStage):
    """Measure losses of sub-networks spread over cost, then train a surrogate to predict them.

    All losses are of the same tokens of training text, so they differ by the sub-network alone. Every loss is kept in
    the cache as it is measured, and never measured twice. An epoch is one pass over the pairs; the held-out pairs,
    which nothing is trained on, give its error.

    Routers of the checkpoint whose losses another surrogate predicted are left out of what this stage writes.

    Args:
        checkpoint: the Flextron checkpoint that the elastic stage wrote.
        optimizer: any torch optimizer.
        settings: the fields of `SurrogateSettings`.

    Raises:
        ValueError: if a number is out of range.
    """

    drops = ("routers/",)
    recorded = tuple(field.name for field in fields(SurrogateSettings) if field.name != "workload")
    options: SurrogateSettings
    trained: TrainedSurrogate
    """Of a fit once its pairs are measured."""

    def __init__(
        self,
        checkpoint: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=1.0),
        **settings: Any,
    ) -> None:
        super().__init__(checkpoint, SurrogateSettings(**settings))
        self.automatic_optimization = True
        self.optimizer = optimizer
        self._restored: dict[str, Any] | None = None

    # --- set-up -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load the frozen backbone, make the surrogate."""
        folder = self.load_frozen()
        space = self.backbone.space
        self.surrogate = Surrogate(space, self.options.hidden, torch.Generator().manual_seed(self.options.seed))
        if self.trainer.state.fn != "fit":
            self.trained = self.read_surrogate(folder, "surrogate")
            self.surrogate = self.trained.network

    def configure_optimizers(self) -> Any:
        """The optimizer of the config."""
        return self.optimizer(self.surrogate.parameters())

    def on_fit_start(self) -> None:
        """Measure the pairs, and start from the ridge solution; a resumed run has both."""
        if self._restored is not None:
            pairs = Pairs.from_tensors(self._restored["pairs"])
            full_loss, text = self._restored["full_loss"], self._restored["text"]
        else:
            text = self.text_to_measure_on(self.options.tokens, self.options.block_size)
            self.measure_on(text, self.options.measure_batch_size)
            full_loss, pairs = self._measured_pairs()
        self.trained = TrainedSurrogate(self.surrogate, self.options.target, full_loss, pairs, text)
        learned = pairs.select(held_out=False)
        self._inputs = learned.one_hot(self.backbone.space).to(self.device)
        self._targets = self.trained.targets(learned.losses).to(self.device)
        if self._restored is None:
            prior = None
            if self.excess is not None:
                prior = self.excess.objective(self.cost_table(self.options.cost)).effects.float().to(self.device)
            self.surrogate.start(self._inputs, self._targets, prior)
        self._report_ridge()

    def _measured_pairs(self) -> tuple[float, Pairs]:
        space, table = self.backbone.space, self.cost_table(self.options.cost)
        generator = torch.Generator().manual_seed(self.options.seed)
        counts = (self.options.pairs, self.options.held_out)
        # near what budgets get the surrogate has to be right, and elsewhere to know that it is worse
        strategy = stratified if self.excess is None else self.excess.drawn_or_stratified
        learned, checked = draw(space, table, counts, generator, strategy)
        full = self.measure([space.full()]).losses
        pairs = self.measure(learned, f"measuring losses of {len(learned)} sub-networks")
        held_out = self.measure(checked, f"measuring losses of {len(checked)} held-out sub-networks", held_out=True)
        return float(full), pairs + held_out

    # --- training -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ResumableLoader:
        """Which pairs make a batch."""
        return self.positions(self.options.pairs, self.options.batch_size, self.options.seed)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Squared error over the targets' variance.

        Raises:
            NonFiniteError: if it is not a number.
        """
        error = self.surrogate.error(self._inputs[batch], self._targets[batch])
        self.check_finite({"the surrogate's error": error})
        return error

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Log the step that was just made."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        self.log_step({"train/surrogate_error": outputs["loss"]})
        self.log("surrogate_error", outputs["loss"], prog_bar=True, logger=False)

    # --- how well it predicts -----------------------------------------------------------------------------------

    def val_dataloader(self) -> DataLoader[int]:
        """The held-out pairs, in one batch."""
        once: Any = range(1)
        return DataLoader(once)

    # nothing is chosen by them, so they test as well as validate
    test_dataloader = predict_dataloader = val_dataloader

    def held_out(self) -> tuple[Pairs, Tensor]:
        """Held-out pairs, and the loss that the surrogate predicts for each, [n] nats per token."""
        pairs = self.trained.pairs.select(held_out=True)
        predicted = self.trained.predict(pairs.one_hot(self.backbone.space).to(self.device))
        return pairs, self.trained.to_nats(predicted).cpu()

    def metrics(self) -> dict[str, float]:
        """How well the surrogate predicts the held-out pairs now."""
        pairs, predicted = self.held_out()
        return quality(predicted, pairs.losses)

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Compare predicted with observed losses."""
        self.log_dict({f"val/surrogate/{name}": value for name, value in self.metrics().items()}, batch_size=1)

    def test_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        """As `validation_step`."""
        self.log_dict({f"test/surrogate/{name}": value for name, value in self.metrics().items()}, batch_size=1)

    def predict_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Choices, observed and predicted loss of every held-out pair."""
        pairs, predicted = self.held_out()
        rows = zip(pairs.choices.tolist(), pairs.losses.tolist(), predicted.tolist(), strict=True)
        return [{"sub_network": choices, "loss": loss, "predicted": value} for choices, loss, value in rows]

    def _report_ridge(self) -> None:
        """The additive baseline's error, once: the surrogate has to beat it."""
        space, trained = self.backbone.space, self.trained
        learned, checked = (trained.pairs.select(held_out=held_out) for held_out in (False, True))
        weight, bias = ridge(learned.one_hot(space).flatten(1), trained.targets(learned.losses))
        predicted = trained.to_nats(checked.one_hot(space).flatten(1) @ weight + bias)
        self.ridge_metrics = quality(predicted, checked.losses)
        rank_zero_info(f"ridge fit on {len(learned)} pairs: {shown(self.ridge_metrics)}")

    # --- what is kept -------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """The surrogate, and the routers that owe nothing to the one before."""
        about = {"held_out_quality": self.metrics(), "ridge_quality": self.ridge_metrics, **self.settings()}
        kept = measured_files(self.flextron_folder(), self.backbone.space)
        return {SURROGATE: replace(self.trained, settings=about).to_bytes(), **kept}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the pairs."""
        super().on_save_checkpoint(checkpoint)
        pairs, full_loss, text = self.trained.pairs.tensors(), self.trained.full_loss, self.trained.text
        checkpoint["surrogate"] = {"pairs": pairs, "full_loss": full_loss, "text": text}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self._restored = checkpoint["surrogate"]


def quality(predicted: Tensor, observed: Tensor) -> dict[str, float]:
    """How well losses are predicted: mean absolute error in nats and over the standard deviation, rank correlation."""
    error = mean_absolute_error(predicted, observed)
    return {
        "mean_absolute_error": float(error),
        "error_over_std": float(error / observed.std()),
        "rank_correlation": float(spearman_corrcoef(predicted, observed)),
    }


def shown(metrics: dict[str, float]) -> str:
    """Figures of `quality` in one line."""
    return (
        f"rank correlation {metrics['rank_correlation']:.4f}, mean absolute error "
        f"{metrics['mean_absolute_error']:.3f} nats ({metrics['error_over_std']:.1%} of the standard deviation)"
    )
