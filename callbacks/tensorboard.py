from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.stages import Stage, SurrogateTraining
from flextron_lit.stages.loss_history import Report
from flextron_lit.stages.validation import DYNAMIC, ROUTED

TRAINER = ("max_steps", "max_epochs", "precision", "devices", "num_nodes")
"""Settings of the trainer that runs are compared by."""
OF_CLASSES = ("lr", "weight_decay")
"""What is told of an optimizer, beside its class: the rest is rarely set and would be most of the table."""
HPARAMS = "hparams"
"""Folder beside the event files: TensorBoard shows hyper-parameters with every scalar of their folder."""
LAYOUT: dict[str, dict[str, list[Any]]] = {
    "is it working": {
        "held-out loss of sub-networks and budgets": ["Multiline", [r"val/[^/]+/mean/loss$"]],
        "training loss": ["Multiline", [r"train/(.+/)?(loss|language|predicted_loss)$"]],
        "surrogate on held-out sub-networks": ["Multiline", [r"val/surrogate/(rank_correlation|error_over_std)$"]],
        "gate of the router: open, error": ["Multiline", [r"train/gate_(open|error)$"]],
        "tokens per second": ["Multiline", [r"train/tokens_per_second$"]],
        "share of time waiting for data": ["Multiline", [r"train/data_wait$"]],
    },
    "routers": {
        "cost above the budget": ["Multiline", [r"train/(.+/)?cost_gap$"]],
        "cost of dynamic routers, held-out text": ["Multiline", [r"val/.+/cost$"]],
        "entropy of choices": ["Multiline", [r"train/(.+/)?entropy$"]],
        "temperature": ["Multiline", [r"train/temperature$"]],
    },
}
"""TensorBoard's page of custom scalars: panels, charts, and the names that belong into a chart."""


class TensorBoardOverview(Callback):
    """What answers "is it working" at a glance, and lets runs compare.

    In TensorBoard a page of custom scalars, and at the end of a run its hyper-parameters with its final losses: of the
    full network and of routers' answers, or the surrogate's quality. Every logger gets the hyper-parameters, and
    `train/data_wait`: the share of a step's time that went into waiting for batches, and where these are text
    `train/tokens_per_second`. Hyper-parameters are those of the run folder's config; outside one there are none.
    """

    def __init__(self) -> None:
        self._step = 0
        self._tokens = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the loggers what this run is."""
        config = RunFolder(Path(trainer.default_root_dir)).config
        if stage == "fit" and config is not None:
            for logger in trainer.loggers:
                logger.log_hyperparams(hyperparameters(config))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay the page out."""
        self._step = trainer.global_step
        for logger in tensorboards(trainer):
            logger.experiment.add_custom_scalars(LAYOUT)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the times of an update, before its state is saved."""
        assert isinstance(pl_module, Stage)
        if isinstance(batch, Mapping):
            self._tokens += batch["input_ids"].numel() * trainer.world_size
        if trainer.global_step == self._step:
            return
        waited, seconds = pl_module.take_seconds()
        metrics = {"train/data_wait": waited / seconds}
        if self._tokens:
            metrics["train/tokens_per_second"] = self._tokens / seconds
        pl_module.write_step(metrics)
        self._step, self._tokens = trainer.global_step, 0

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the hyper-parameters beside what they led to."""
        folder = RunFolder(Path(trainer.default_root_dir))
        config = folder.config
        if config is None:
            return
        for logger in tensorboards(trainer):
            final = final_metrics(folder, pl_module)
            write_hparams(Path(logger.log_dir) / HPARAMS, hyperparameters(config), final, trainer.global_step)


def hyperparameters(config: Mapping[str, Any]) -> dict[str, int | float | str]:
    """Settings by dotted names without `init_args`; ours.

    Args:
        config: what a run folder's `config.yaml` holds.

    Returns:
        `stage`, `seed`, and what is set under `model`, `data`, `trainer` and by callback; lists as text.
    """
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    found: dict[str, Any] = {"stage": _class_name(model["class_path"]), "seed": config["seed_everything"]}
    found |= _leaves("model", model["init_args"])
    found |= _leaves("data", {**data, "domains": list(data["domains"])})
    found |= _leaves("trainer", {name: trainer[name] for name in TRAINER})
    given = trainer["callbacks"] or ()
    for callback in given if isinstance(given, list | tuple) else (given,):
        found |= _leaves(_class_name(callback["class_path"]), callback.get("init_args", {}))
    return {name: ", ".join(map(str, each)) if isinstance(each, list) else each for name, each in found.items()}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and "class_path" in value:
        yield name, _class_name(value["class_path"])
        value = {each: value.get("init_args", {}).get(each) for each in OF_CLASSES}
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    elif value is not None:
        yield name, value


def _class_name(path: str) -> str:
    return path.rsplit(".", 1)[-1]


def final_metrics(folder: RunFolder, stage: LightningModule) -> dict[str, float]:
    """What runs are compared by, under the names that validation logs it: lower losses, a better surrogate.

    From the files of the run, since one that resumes behind its last validation does not validate again.
    """
    if isinstance(stage, SurrogateTraining):
        return {f"val/surrogate/{name}": value for name, value in stage.metrics().items()}
    report = Report(folder.path, "training", append=True)
    shown = ("full", ROUTED, DYNAMIC)
    last = report.losses(report.steps[-1]) if report.steps else {}
    return {f"val/{name}/mean/loss": row["mean"] for name, row in last.items() if name.startswith(shown)}


def write_hparams(folder: Path, settings: dict[str, Any], metrics: dict[str, float], step: int) -> None:
    """A row of TensorBoard's page of hyper-parameters.

    Lightning's `log_hyperparams(params, metrics)` also declares the columns of the page, and TensorBoard then shows
    those of one run for all; without a declaration it shows the columns of all.
    """
    _, begin, end = hparams(settings, metrics)
    with SummaryWriter(str(folder)) as writer:
        for summary in (begin, end):
            writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)


def tensorboards(trainer: Trainer) -> list[TensorBoardLogger]:
    """The run's TensorBoards; none on ranks that do not log."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Into every TensorBoard of the run, at the step that it is at."""
    for logger in tensorboards(trainer):
        logger.experiment.add_figure(name, figure, trainer.global_step)
