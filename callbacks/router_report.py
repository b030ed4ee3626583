from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from matplotlib.figure import Figure
from torch import Tensor

from flextron_lit.callbacks.tensorboard import log_figure
from flextron_lit.data.loader import in_order
from flextron_lit.files.whole_file import write_csv, write_text
from flextron_lit.report.spending import plots as compute_figures
from flextron_lit.report.spending.page import page
from flextron_lit.report.spending.routed_text import RoutedText, route_text
from flextron_lit.report.spending.shades import Scale
from flextron_lit.report.spending.token_groups import groups_of, summary
from flextron_lit.routers import plots as figures
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.routers.ladder import Ladder
from flextron_lit.space import width_ratios
from flextron_lit.stages import JointTuning, StaticRouterTraining, SurrogateTraining, WatchedStage
from flextron_lit.stages.surrogate_training import shown
from flextron_lit.stages.validation import DYNAMIC, ValidationResult

SHOWN_TOKENS = 200
"""Of each domain, in `compute.html` and TensorBoard."""


class RouterReport(Callback):
    """Figures of what a surrogate or a router learned, in TensorBoard and the run folder; other stages have none.

    `surrogate.png` and `.csv`: predicted against observed losses of held-out sub-networks. `widths.png`: what each
    budget gives to every layer; `ladder.png` and `.csv`: cost and loss of every budget's answer, predicted by the
    surrogate or, after joint tuning, measured.

    Of dynamic routers, at each validation: `widths_by_domain.png` and `.csv`: mean width of every layer at each budget;
    and at the middle one of the budgets, `token_classes.png` and `.csv`: mean cost by class of token, and
    `compute.html`: text shaded by cost.
    """

    def __init__(self) -> None:
        self._said: str | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw a router's answers as they are now."""
        if not trainer.is_global_zero:
            return
        if trainer.state.fn == "fit" and isinstance(pl_module, StaticRouterTraining | JointTuning) and pl_module.ladder:
            for name, figure in ladder_figures(pl_module, pl_module.ladder).items():
                log_figure(trainer, f"router/{name}", figure)
        if isinstance(pl_module, WatchedStage) and pl_module.result is not None:
            self._said = report_compute(trainer, pl_module, pl_module.result)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final ones, and say how good it is."""
        if not trainer.is_global_zero:
            return
        if isinstance(pl_module, SurrogateTraining):
            report_surrogate(trainer, pl_module)
        if isinstance(pl_module, StaticRouterTraining | JointTuning) and pl_module.ladder:
            report_ladder(trainer, pl_module, pl_module.ladder)
        if isinstance(pl_module, StaticRouterTraining):
            report_moves(trainer, pl_module)
        if self._said is not None:
            rank_zero_info(self._said)


def report_surrogate(trainer: Trainer, stage: SurrogateTraining) -> None:
    """The held-out pairs: figure, rows, one line."""
    folder = Path(trainer.default_root_dir)
    pairs, predicted = stage.held_out()
    metrics = stage.metrics()
    title = f"{len(pairs)} held-out sub-networks: rank correlation {metrics['rank_correlation']:.3f}"
    figure = figures.predicted_against_observed(predicted.tolist(), pairs.losses.tolist(), title)
    figure.savefig(folder / "surrogate.png", dpi=120)
    log_figure(trainer, "surrogate/predicted against observed", figure)
    found = zip(predicted.tolist(), pairs.losses.tolist(), pairs.choices.tolist(), strict=True)
    rows = [{"predicted": p, "observed": o, "sub_network": " ".join(map(str, choices))} for p, o, choices in found]
    write_csv(folder / "surrogate.csv", rows)
    rank_zero_info(f"ridge fit, held out: {shown(stage.ridge_metrics)}\nsurrogate, held out: {shown(metrics)}")


def report_ladder(trainer: Trainer, stage: StaticRouterTraining | JointTuning, ladder: Ladder) -> None:
    """Figures, rows, one line."""
    folder, table = Path(trainer.default_root_dir), stage.table
    for name, figure in ladder_figures(stage, ladder).items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    kind = "measured" if ladder.measured else "predicted"
    ratios = [rung.cost / table.full for rung in ladder.rungs]
    rows = [
        {
            "ratio": ratio,
            table.name: rung.cost,
            f"{kind}_loss": rung.loss,
            "sub_network": " ".join(map(str, rung.sub_network.choices)),
        }
        for ratio, rung in zip(ratios, ladder.rungs, strict=True)
    ]
    write_csv(folder / "ladder.csv", rows)
    rank_zero_info(
        f"the ladder has {len(rows)} sub-networks, from {ratios[0]:.3g} to {ratios[-1]:.3g}; losses are {kind}"
    )


def report_moves(trainer: Trainer, stage: StaticRouterTraining) -> None:
    """How long the gate was open."""
    rank_zero_info(f"the router moved in {stage.moves} of {trainer.global_step} steps")
    if not stage.moves:
        rank_zero_warn(
            "the gate never opened, so the router is untrained and the ladder is the surrogate's own search: train the "
            "surrogate on more pairs, or raise the threshold of callbacks.SurrogateGuidance"
        )


def report_compute(trainer: Trainer, stage: WatchedStage, result: ValidationResult) -> str | None:
    """What dynamic routers give to whom, as the last validation met them: files and figures.

    Returns:
        One line that says which tokens get most; None without a dynamic router.
    """
    policies = {name: w.selection for name, w in result.watched.items() if isinstance(w.selection, DynamicPolicy)}
    if not policies:
        return None
    folder = Path(trainer.default_root_dir)
    mean_widths = (result.shares * width_ratios(result.space).to(result.shares)).sum(-1)  # [S, D, 2L]
    widths = {name: each for name, each in zip(result.watched, mean_widths, strict=True) if name in policies}
    write_csv(folder / "widths_by_domain.csv", list(width_rows(widths, result)))
    if stage.sharding is not None:
        # texts run on this process alone, and a shared-out network needs all
        rank_zero_info("no text is shaded by compute: the network is shared out over processes (see highlight)")
        return None
    # the one in the middle has room to differ on both sides
    router, policy = sorted(policies.items())[(len(policies) - 1) // 2]
    texts = routed_texts(trainer, stage, policy)
    groups = groups_of(texts)
    write_csv(folder / "token_classes.csv", [{"router": router, **group.row()} for group in groups])
    excerpts = {domain: text.excerpt(SHOWN_TOKENS) for domain, text in texts.items()}
    cost = policy.table.name
    by_budget = {name.removeprefix(DYNAMIC): each for name, each in widths.items()}
    write_text(folder / "compute.html", page(excerpts, groups, router, cost))
    drawn = {
        "widths_by_domain": compute_figures.widths_by_domain(by_budget, result.domains, result.space),
        "token_classes": compute_figures.cost_by_group(groups, router, cost),
    }
    for name, figure in drawn.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    scale = Scale.of([text.cost for text in excerpts.values()])
    for domain, text in excerpts.items():
        title = f"{domain}, {router}: share of the full network's {cost}"
        drawn[f"compute/{domain}"] = compute_figures.shaded_text(text, scale, title)
    if trainer.state.fn == "fit":
        for name, figure in drawn.items():
            log_figure(trainer, f"router/{name}", figure)
    return summary(groups, router, cost)


def routed_texts(trainer: Trainer, stage: WatchedStage, policy: DynamicPolicy) -> dict[str, RoutedText]:
    """The validation documents, or this rank's share of them, by domain."""
    text, forward_context = stage.text, trainer.precision_plugin.forward_context
    loaders = zip(text.shown_names, text.val_dataloader(), trainer.num_val_batches, strict=True)
    return {
        domain: route_text(
            stage.backbone, policy, stage.tokenizer, islice(in_order(loader), int(count)), forward_context
        )
        for domain, loader, count in loaders
    }


def width_rows(widths: Mapping[str, Tensor], result: ValidationResult) -> Iterator[dict[str, Any]]:
    """One row a router, domain and block."""
    for router, by_domain in widths.items():
        for domain, row in zip(result.domains, by_domain.tolist(), strict=True):
            for block, width in zip(result.space.blocks, row, strict=True):
                yield {"router": router, "domain": domain, "layer": block.layer, "kind": block.kind, "width": width}


def ladder_figures(stage: StaticRouterTraining | JointTuning, ladder: Ladder) -> dict[str, Figure]:
    """By the stem of their files."""
    return {
        "widths": figures.widths_against_budget(ladder, stage.backbone.space, stage.table),
        "ladder": figures.cost_against_budget(ladder, stage.table),
    }
