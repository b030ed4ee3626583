"""The last stage: backbone and router are tuned together, without a surrogate (paper, joint tuning)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from flextron_lit.checkpoint import StageRecord
from flextron_lit.elastic.unit_gates import gated
from flextron_lit.losses.by_chunk import Predictions
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.routers.ladder import Ladder
from flextron_lit.routers.noise import Temperature, entropy
from flextron_lit.routers.objective import CostPenalty
from flextron_lit.space import SubNetwork
from flextron_lit.stages.backbone_training import BackboneSettings, BackboneTraining, described
from flextron_lit.stages.fully_sharded import FullySharded
from flextron_lit.stages.loss_measuring import MeasuringStage
from flextron_lit.stages.loss_parts import Pass
from flextron_lit.stages.ranks_together import zero_of
from flextron_lit.stages.run_length import by_the_clock, updates_done
from flextron_lit.stages.tuned_router import (
    TUNED,
    Drawn,
    Remeasuring,
    Tuned,
    TunedRouter,
    TunedStaticRouter,
    tuned_routers,
)
from flextron_lit.stages.watched_losses import budgets_to_watch, check_budgets

Draws = Literal["router", "ladder"]


@dataclass(frozen=True, kw_only=True)
class JointSettings(BackboneSettings):
    """What joint tuning can be told."""

    router: Tuned = "static"
    """Which router: `static`, `dynamic`, or `both`, so that none of them is stale afterwards (ours)."""
    cost: str | None = None
    """The cost that the router is for; where the checkpoint has several of them, with the first digits of the cost
    table's hash, as its file has them: `latency-0123abcd`. None means the only router there is."""
    budgets: list[float] | None = None
    """Ratios at which routed sub-networks are validated, beside uniform ones; None means 0.9, 0.8, ..., up to four that
    can be met."""
    train_router: bool = True
    """False trains the backbone on what the router draws and leaves the router as it is: faster, since a sub-network's
    pass computes its own units alone; temperature, penalty and router_optimizer have no effect."""
    draws: Draws = "router"
    """What a step trains for a budget: what the `router` draws at random (paper), or what its `ladder` answers,
    measured before the first step: what users get (ours). The latter of a static router with train_router: false;
    temperature and seed then have no effect."""
    temperature: Temperature = Temperature(start=0.3, end=0.3)
    """Of the Gumbel-softmax; the default is where the router stage ended."""
    penalty: CostPenalty = CostPenalty()
    """On the cost."""
    remeasuring: Remeasuring = Remeasuring()
    """Of the router's answers."""
    seed: int = 0
    """Of the Gumbel noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router not in TUNED:
            raise ValueError(f"router is one of {', '.join(TUNED)}, not {self.router!r}")
        if self.draws not in get_args(Draws):
            raise ValueError(f"draws is one of {', '.join(get_args(Draws))}, not {self.draws!r}")
        if self.draws == "ladder" and (self.train_router or self.router != "static"):
            raise ValueError(
                f"draws: ladder trains what a static router's ladder answers, and no router learns from that: set "
                f"train_router: false and router: static, not {self.train_router} and {self.router}"
            )
        check_budgets(self.budgets)


class JointTuning(MeasuringStage, BackboneTraining):
    """Tune backbone and routers together for a short while.

    Each step: the full network's forward; for every budget that BudgetSampling planned, forward and backward of what
    each router draws for it, straight through to router and backbone; the full network's backward; one update of all.
    The surrogate takes no part: the text says what choices are worth.

    The surrogate and all other routers of the checkpoint knew the weights as they were: they go along marked as stale.
    The tuned routers' answers are measured anew at each validation, the last one after the last step.

    Args:
        checkpoint: the Flextron checkpoint that a router stage wrote.
        optimizer: of the backbone.
        router_optimizer: of the router; its learning rate falls to 0 as a cosine.
        settings: the fields of `JointSettings`.

    Raises:
        ValueError: if a number is out of range.
    """

    plans = "budgets"
    recorded = (
        *BackboneTraining.recorded,
        *("router", "train_router", "draws", "temperature", "penalty", "remeasuring", "seed"),
    )
    options: JointSettings

    def __init__(
        self,
        checkpoint: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        router_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        **settings: Any,
    ) -> None:
        super().__init__(checkpoint, optimizer, JointSettings(**settings))
        self.router_optimizer = router_optimizer
        self.generator = torch.Generator().manual_seed(self.options.seed)
        self._measured_at = 0

    # --- set-up -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load backbone and router."""
        folder = self.flextron_folder()
        self.load_trainable(None)
        self.tuned = tuned_routers(self.options.router, self.options.cost, folder, self.backbone.space)
        self.routers = torch.nn.ModuleList(tuned.network for tuned in self.tuned)
        self.routers.requires_grad_(self.options.train_router)
        self.table, self.costs = self.tuned[0].table, self.tuned[0].costs
        self._watch()

    def share_out(self, strategy: FullySharded) -> None:
        """As for every stage; tokens that take widths of their own may use other weights on each process."""
        super().share_out(strategy)
        if self.options.router != "static" and not self.options.train_router:
            # all wait for the gradients of all; with gates every width takes part anyway
            network: Any = self.backbone.model
            network.set_reduce_scatter_unused_params(True)

    def configure_optimizers(self) -> Any:
        """The backbone's and, if they are trained, the routers', each with its schedule."""
        backbone = super().configure_optimizers()
        if not self.options.train_router:
            return backbone
        groups = [group for tuned in self.tuned for group in tuned.groups()]
        router = self.router_optimizer([{"params": parameters} for parameters, _ in groups])
        for group, (_, times) in zip(router.param_groups, groups, strict=True):
            group["lr"] *= times
        schedule = by_the_clock(get_cosine_schedule_with_warmup(router, 0, self.planned_updates()), self.trainer)
        return backbone, {"optimizer": router, "lr_scheduler": schedule}

    # --- training -----------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Measure what budgets get, where that is what is trained; a resumed run has it."""
        super().on_train_start()
        if self.options.draws == "ladder" and not self.trainer.global_step:
            self._remeasure()

    def train_planned(self, planned: float, full: Pass, original: Predictions | None) -> Iterator[tuple[str, Tensor]]:
        """Forward and backward of what each router draws for a budget."""
        for tuned in self.tuned:
            budget = max(planned, tuned.lowest)
            loss = self._train_routed(tuned, budget, full, original)
            yield f"what the {tuned.kind} router drew for the budget {budget:.3f}", loss.detach()

    def _train_routed(self, tuned: TunedRouter, budget: float, full: Pass, original: Predictions | None) -> Tensor:
        drawn = self._drawn(tuned, budget, len(full.batch["input_ids"]))
        sub_network = drawn.selection if isinstance(drawn.selection, SubNetwork) else None
        # with gates where choices need gradients; else the sub-network itself, which is less work
        gates = gated(self.backbone, drawn.choose) if self.options.train_router else self.backbone.use(drawn.selection)
        # backward inside it too: checkpointed activations are recomputed there, with the choices of the forward
        with gates:
            done = Pass(sub_network, full.batch, self.predictions(full.batch))
            loss = self.smaller_loss(done, tuned.prefix, full, original)
            ratios = drawn.routed.ratios(tuned.table)
            if self.options.train_router:
                penalty = self.options.penalty.of(ratios, torch.full_like(ratios, budget))
                self.parts.add(f"{tuned.prefix}/cost_penalty", penalty)
                loss = loss + penalty
            self.backward_planned(loss)
        self.parts.add(f"{tuned.prefix}/cost_gap", ratios.mean() - budget)
        self.parts.add(f"{tuned.prefix}/entropy", entropy(drawn.routed.logits.detach()).mean())
        return loss

    def _drawn(self, tuned: TunedRouter, budget: float, sequences: int) -> Drawn:
        if self.options.draws == "ladder":
            assert isinstance(tuned, TunedStaticRouter), "refused by the settings"
            return tuned.answered(budget)
        temperature = self.options.temperature.at(updates_done(self.trainer) / self.planned_updates())
        return tuned.draw(budget, sequences, self.generator, temperature, self.place)

    def train_full(self, loss: Tensor) -> None:
        """The full network's backward."""
        if self.options.train_router:
            # data-parallel ranks reduce gradients in this backward pass alone
            loss = loss + zero_of(self.routers)
        super().train_full(loss)

    def clip(self) -> dict[str, Tensor]:
        """As for every stage, with the routers' norm."""
        norms = super().clip()
        if self.options.train_router:
            gradients = [p.grad for p in self.routers.parameters() if p.grad is not None]
            norms["router_gradient_norm"] = torch.nn.utils.get_total_norm(gradients)
        return norms

    def rates(self) -> dict[str, float]:
        """Learning rates and temperature, for the log."""
        rates = super().rates()
        if self.options.train_router:
            # of the step that was just made
            progress = (updates_done(self.trainer) - 1) / self.planned_updates()
            rates["router_learning_rate"] = self.trainer.optimizers[1].param_groups[0]["lr"]
            rates["temperature"] = self.options.temperature.at(progress)
        return rates

    # --- what the router answers --------------------------------------------------------------------------------

    @property
    def ladder(self) -> Ladder | None:
        """What a static router answers, as of the last validation."""
        return next((tuned.ladder for tuned in self.tuned if tuned.ladder), None)

    def on_validation_epoch_start(self) -> None:
        """What the router answers now; before training, what the checkpoint said."""
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._remeasure()
        else:
            self._watch()

    def on_test_start(self) -> None:
        """What the router answers, where the network is now."""
        self._watch()

    on_predict_start = on_test_start

    def on_train_end(self) -> None:
        """What the router answers now, where nothing was validated since the last step."""
        if self._measured_at != self.trainer.global_step:
            self._remeasure()

    def _remeasure(self) -> None:
        with self.backbone.evaluating():
            for tuned in self.tuned:
                tuned.remeasure(self, self.options.remeasuring)
        self._measured_at = self.trainer.global_step
        self._watch()

    def _watch(self) -> None:
        answers: dict[str, SubNetwork | DynamicPolicy] = {}
        for tuned in self.tuned:
            budgets = budgets_to_watch(self.options.budgets, tuned.table, tuned.lowest)
            answers |= tuned.answers(budgets, self.backbone.model)
        self.watch_answers(answers, self.costs)

    # --- what is kept -------------------------------------------------------------------------------------------

    def record(self) -> StageRecord:
        """As for every stage; a run that resumed behind its last step measures here, where all ranks come by."""
        self.on_train_end()
        return super().record()

    def files(self) -> dict[str, bytes]:
        """The routers, and what else the checkpoint held, marked as stale."""
        settings = self.settings()
        return super().files() | {path: data for t in self.tuned for path, data in t.files(settings).items()}

    def settings(self) -> dict[str, Any]:
        """As for every stage that trains a backbone, with this one's own."""
        settings = super().settings() | {
            "costs": {tuned.kind: tuned.table.name for tuned in self.tuned},
            "tables_sha256": {tuned.kind: tuned.table.sha256 for tuned in self.tuned},
        }
        if self.options.train_router:
            settings["router_optimizer"] = described(self.trainer.optimizers[1])
        return settings

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the generator and the router's answers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["joint"] = {
            "generator": self.generator.get_state(),
            "answers": [tuned.state() for tuned in self.tuned],
            "measured_at": self._measured_at,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.generator.set_state(checkpoint["joint"]["generator"])
        for tuned, state in zip(self.tuned, checkpoint["joint"]["answers"], strict=True):
            tuned.restore(state)
        self._measured_at = checkpoint["joint"]["measured_at"]
