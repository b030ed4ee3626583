"""What of Lightning's trainer a run cannot have: said in one line before anything is loaded."""

import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.utilities.model_helpers import is_overridden

from flextron_lit import callbacks
from flextron_lit.stages import RouterTraining, Stage, WatchedStage
from flextron_lit.stages.monitored import absent, awaited
from flextron_lit.stages.precision import check_precision
from flextron_lit.stages.strategies import check_strategy

OWNED = {
    "default_root_dir": "name the place with --run_folder",
    "use_distributed_sampler": "the loaders share the text between ranks themselves",
    "gradient_clip_val": "several backward passes make a step; set model.init_args.clip_norm",
    "gradient_clip_algorithm": "several backward passes make a step; set model.init_args.clip_norm",
    "overfit_batches": "the loaders order the text themselves; train on a domain of little text, for many steps",
    "barebones": "a run keeps its state, tables and checkpoint; leave it out",
}
"""Trainer options that would have no effect or do harm here, and what to do instead."""
BATCHES = {
    "fit": "limit_train_batches",
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
"""The option without whose batches a command has nothing to do."""
REFUSED: dict[type[Callback], str] = {
    StochasticWeightAveraging: "a stage steps its own schedule; take lightning.pytorch.callbacks.EMAWeightAveraging",
    LearningRateFinder: "a step has several backward passes, which it knows nothing of; try rates in short runs",
    BatchSizeFinder: "a step has several backward passes, which it knows nothing of; set data.init_args.batch_size",
    GradientAccumulationScheduler: "several backward passes make a step; set model.init_args.accumulate",
    ModelPruning: "its masks are in the way of narrower widths; set the widths with model.init_args.space",
    BaseFinetuning: "a stage says itself what learns; set model.init_args.trained",
    SpikeDetection: "a stage itself stops before an update by a loss that is no number; leave it out",
}
"""Callbacks that cannot work with a stage's own updates, and what to do instead."""
ONCE = (
    callbacks.BudgetSampling,
    callbacks.ExactResume,
    callbacks.FlextronCheckpointWriter,
    callbacks.LatencyProfiling,
    callbacks.ParetoReport,
    callbacks.PredictionWriter,
    callbacks.RouterReport,
    callbacks.SurrogateGuidance,
    callbacks.TensorBoardOverview,
)
"""Of two of these the later one would undo or repeat what the first did."""
LOGGED = ["train/.+", "[a-z_]+/(loss|kl_.+)", "surrogate_error", "step", "lr-.+"]
"""Forms of the metrics that stages log, beside those of validation."""


def check_sections(config: Any) -> None:
    """Refuse sections of a config that are no mappings, which the parser lets pass.

    Raises:
        ValueError: naming the first.
    """
    for section in ("model", "data", "trainer"):
        if not isinstance(config[section], Namespace):
            raise ValueError(f"{section} is a mapping of settings, not {config[section]!r}: see configs/debug.yaml")


def check_options(options: Any, command: str) -> None:
    """Refuse settings of the trainer.

    Args:
        options: `trainer` of a resolved config.
        command: `fit`, `validate`, `test` or `predict`.

    Raises:
        ValueError: naming the first, and what to do instead.
    """
    for option, instead in OWNED.items():
        if options[option]:
            raise ValueError(f"trainer.{option} cannot be set: {instead}")
    if options.accumulate_grad_batches != 1:
        raise ValueError("trainer.accumulate_grad_batches cannot be set: use model.init_args.accumulate")
    if options.enable_checkpointing is False:
        raise ValueError("trainer.enable_checkpointing cannot be false: a run keeps its state to resume from")
    check_strategy(options.strategy)
    empty = [BATCHES[command], *(("max_steps", "max_epochs") if command == "fit" else ())]
    for option in empty:
        if options[option] == 0:
            raise ValueError(f"trainer.{option} is 0: {command} would do nothing")
    check_precision(str(options.precision), (), fitting=False)


def check_end(options: Any, chosen: Sequence[Callback]) -> None:
    """Refuse to train without an end.

    Raises:
        ValueError: if neither steps, nor epochs, nor a clock end the run.
    """
    timed = any(isinstance(each, Timer) and each.time_remaining() is not None for each in chosen)
    if options.max_steps < 0 and not (options.max_epochs or options.max_time or timed):
        raise ValueError("nothing says how long to train: add --trainer.max_steps 2000, max_epochs or max_time")


def check_callbacks(chosen: Sequence[Callback], stage: Stage, domains: Sequence[str]) -> None:
    """Refuse callbacks that cannot train a stage.

    Args:
        chosen: those of the config, and those that every run has.
        stage: what is to be trained.
        domains: names of its text domains.

    Raises:
        ValueError: naming the first, and what to do instead.
    """
    for each in chosen:
        for refused, instead in REFUSED.items():
            if isinstance(each, refused):
                raise ValueError(f"{type(each).__name__} cannot work here: {instead}")
    kinds = [kind for kind in ONCE if sum(isinstance(each, kind) for each in chosen) > 1]
    keys = [each.state_key for each in chosen if is_overridden("state_dict", each, Callback)]
    twice = [kind.__name__ for kind in kinds] or [key.split("{")[0] for key in keys if keys.count(key) > 1]
    if twice:
        raise ValueError(f"there are two {twice[0]} in trainer.callbacks: take one of them out")
    _check_averaging(chosen)
    ours = ("flextron_lit.", "lightning.")
    if all(type(each).__module__.startswith(ours) for each in (stage, *chosen)):
        # a class of the user's own may log, plan and guide as it likes
        _check_missing(chosen, stage, domains)


def _check_averaging(chosen: Sequence[Callback]) -> None:
    """Averages of weights are validated, but what is kept as best are the weights of the moment."""
    averaging = [each for each in chosen if isinstance(each, WeightAveraging)]
    best = [each for each in chosen if isinstance(each, callbacks.FlextronCheckpointWriter) and each.keep == "best"]
    if averaging and best:
        raise ValueError(
            f"{type(averaging[0]).__name__} puts its average in place at the end of a run, and keep best of "
            "FlextronCheckpointWriter is what was there before: set keep to last"
        )
    for each in averaging:
        # nothing here learns in a buffer; averages of masks and frequencies would only be rounded
        each._use_buffers = False


def _check_missing(chosen: Sequence[Callback], stage: Stage, domains: Sequence[str]) -> None:
    """Refuse what lacks a plan, a guide or a metric."""
    if isinstance(stage, WatchedStage) and not any(isinstance(each, callbacks.BudgetSampling) for each in chosen):
        raise ValueError(f"nothing draws {stage.plans} to train: add callbacks.BudgetSampling to trainer.callbacks")
    guided = any(isinstance(each, callbacks.SurrogateGuidance) for each in chosen)
    if isinstance(stage, RouterTraining) and not (guided or stage.without_surrogate):
        raise ValueError(
            "nothing guides the router: add callbacks.SurrogateGuidance to trainer.callbacks, or train it through the "
            "backbone"
        )
    names = "|".join(map(re.escape, (*domains, "mean")))
    watched = rf"val/[^/]+/({names})/(loss|perplexity|cost)"
    validated = watched if isinstance(stage, WatchedStage) else "val/surrogate/.+"
    for name, metric in awaited(chosen):
        if not re.fullmatch("|".join([validated, *LOGGED]), metric):
            examples = ["val/full/mean/loss"] if isinstance(stage, WatchedStage) else ["val/surrogate/error_over_std"]
            raise ValueError(absent(name, metric, examples))
