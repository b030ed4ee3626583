from __future__ import annotations

import csv
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure

from flextron_lit.routers import figures
from flextron_lit.stages import StaticRouterTraining, SurrogateTraining
from flextron_lit.stages.surrogate_training import shown


class RouterReport(Callback):
    """Figures of what a surrogate or a router learned, in TensorBoard and the run folder; other stages have none.

    `surrogate.png` and `.csv`: predicted against observed losses of held-out sub-networks. `widths.png`: what each
    budget gives to every layer; `ladder.png` and `.csv`: cost and predicted loss of every budget's answer.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw a router's answers as they are now."""
        if trainer.is_global_zero and trainer.state.fn == "fit" and isinstance(pl_module, StaticRouterTraining):
            for name, figure in router_figures(pl_module).items():
                log_figure(trainer, f"router/{name}", figure)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final ones, and say how good it is."""
        if trainer.is_global_zero and isinstance(pl_module, SurrogateTraining):
            report_surrogate(trainer, pl_module)
        if trainer.is_global_zero and isinstance(pl_module, StaticRouterTraining):
            report_router(trainer, pl_module)


def report_surrogate(trainer: Trainer, stage: SurrogateTraining) -> None:
    """The held-out pairs: figure, rows, one line."""
    folder = Path(trainer.default_root_dir)
    pairs, predicted = stage.held_out()
    metrics = stage.metrics()
    title = f"{len(pairs)} held-out sub-networks: rank correlation {metrics['rank_correlation']:.3f}"
    figure = figures.predicted_against_observed(predicted.tolist(), pairs.losses.tolist(), title)
    figure.savefig(folder / "surrogate.png", dpi=120)
    log_figure(trainer, "surrogate/predicted against observed", figure)
    with (folder / "surrogate.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["predicted", "observed", "sub_network"])
        rows = zip(predicted.tolist(), pairs.losses.tolist(), pairs.choices.tolist(), strict=True)
        writer.writerows([*numbers, " ".join(map(str, choices))] for *numbers, choices in rows)
    rank_zero_info(f"ridge fit, held out: {shown(stage.ridge_metrics)}\nsurrogate, held out: {shown(metrics)}")


def report_router(trainer: Trainer, stage: StaticRouterTraining) -> None:
    """The ladder: figures and rows."""
    folder = Path(trainer.default_root_dir)
    for name, figure in router_figures(stage).items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    with (folder / "ladder.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["ratio", stage.table.name, "predicted_loss", "sub_network"])
        for rung in stage.ladder.rungs:
            choices = " ".join(map(str, rung.sub_network.choices))
            writer.writerow([rung.cost / stage.table.full, rung.cost, rung.loss, choices])
    rungs = stage.ladder.rungs
    rank_zero_info(
        f"the ladder has {len(rungs)} sub-networks, from {rungs[0].cost / stage.table.full:.3f} to 1; the router moved "
        f"in {stage.moves} of {trainer.global_step} steps"
    )
    if not stage.moves:
        rank_zero_warn(
            "the gate never opened, so the router is untrained and the ladder is the surrogate's own search: train the "
            "surrogate on more pairs, or raise the threshold of callbacks.SurrogateGuidance"
        )


def router_figures(stage: StaticRouterTraining) -> dict[str, Figure]:
    """By the stem of their files."""
    return {
        "widths": figures.widths_against_budget(stage.ladder, stage.backbone.space, stage.table),
        "ladder": figures.cost_against_budget(stage.ladder, stage.table),
    }


def log_figure(trainer: Trainer, name: str, figure: Figure) -> None:
    """Into every TensorBoard of the run."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(name, figure, trainer.global_step)
