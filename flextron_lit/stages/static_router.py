"""Stage 3: the static router learns which sub-network to take for a budget (paper, static routers)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.elastic.unit_gates import for_all_tokens, gated
from flextron_lit.files.places import SURROGATE
from flextron_lit.losses.by_chunk import mean_cross_entropy
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.routers.ladder import Ladder, build_ladder
from flextron_lit.routers.objective import Routed, route
from flextron_lit.routers.pairs import Pairs
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.surrogate import Surrogate
from flextron_lit.routers.trained import TrainedRouter
from flextron_lit.stages.router_training import RouterSettings, RouterTraining, functional, on_processor
from flextron_lit.stages.run_length import planned
from flextron_lit.stages.watched_losses import ladder_answers


@dataclass(frozen=True, kw_only=True)
class StaticRouterSettings(RouterSettings):
    """What training a static router can be told."""

    hidden: int = 128
    """Width of the router's MLP."""
    through_backbone: bool = False
    """No surrogate guides the router: choices run through the backbone on training text, with gradients straight
    through (the paper argues against it; docs/experiments.md compares)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts("hidden")


class StaticRouterTraining(RouterTraining):
    """Train a router for one cost, through the surrogate or through the backbone.

    A step: hard choices for the budgets that BudgetSampling planned, the guide's loss of them, the penalty on their
    cost, one update. With callbacks.SurrogateGuidance the surrogate goes on learning from losses measured on the
    router's own choices, and the router moves only while the surrogate is good enough. The stage ends with the ladder.

    Args:
        checkpoint: the Flextron checkpoint that the surrogate stage wrote.
        optimizer: of the router; its learning rate falls to 0 as a cosine.
        surrogate_optimizer: of the surrogate, as it goes on learning.
        settings: the fields of `StaticRouterSettings`.

    Raises:
        ValueError: if a number is out of range.
    """

    recorded = (*RouterTraining.recorded, "hidden", "through_backbone")
    options: StaticRouterSettings
    router: StaticRouter
    surrogate: Surrogate
    pairs: Pairs

    def __init__(
        self,
        checkpoint: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-3),
        surrogate_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1.0),
        **settings: Any,
    ) -> None:
        super().__init__(checkpoint, optimizer, surrogate_optimizer, StaticRouterSettings(**settings))

    # --- contracts with callbacks.SurrogateGuidance -------------------------------------------------------------

    @property
    def without_surrogate(self) -> str | None:
        """The setting that makes a surrogate useless; None if one guides the router."""
        return "through_backbone: true" if self.options.through_backbone else None

    @torch.no_grad()
    def observe(self, count: int, generator: torch.Generator) -> Sequence[tuple[float, float]]:
        """Measure the router's own choices for random budgets; the surrogate learns from them from now on."""
        budgets = torch.tensor(sampling.budgets(self.table.smallest_ratio, count, generator))
        pairs = self.measure(self.route(budgets, generator).sub_networks)
        predicted = self.surrogate(pairs.one_hot(self.backbone.space).to(self.device)).tolist()
        self.pairs = self.pairs + pairs
        # it holds the pairs from before
        self.__dict__.pop("_learned", None)
        return list(zip(predicted, self.trained.targets(pairs.losses).tolist(), strict=True))

    @property
    def observed(self) -> int:
        """Pairs that the surrogate learns from."""
        return len(self.pairs)

    def route(self, budgets: Tensor, generator: torch.Generator) -> Routed:
        """Random hard choices for some budgets [B], at the present temperature."""
        return route(self.router, budgets.to(self.device), generator, self.options.temperature.at(self.progress))

    # --- set-up -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load the frozen backbone and the surrogate, make the router."""
        folder = self.load_frozen()
        self.trained = self.read_surrogate(folder, SURROGATE)
        self.surrogate = self.trained.network.requires_grad_(self.surrogate_learns)
        self.pairs = self.trained.pairs
        generator = torch.Generator().manual_seed(self.options.seed)
        self.router = StaticRouter(self.backbone.space, self.options.hidden, generator)
        if self.trainer.state.fn != "fit":
            found = self.trained_one(TrainedRouter.read_all(folder, self.backbone.space), "router")
            self.router, self.table, self.ladder = found.network, found.table, found.ladder
            self._watch()

    def on_fit_start(self) -> None:
        """Find the cost table, and the text that losses are measured on."""
        super().on_fit_start()
        self.router.scale_to(self.table)
        self.measure_on(self.trained.text, self.trained.settings["measure_batch_size"])

    # --- training -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        """Training text for choices that run through the backbone, else nothing but a count of the steps."""
        if self.options.through_backbone:
            return self.text.train_dataloader()
        return self.positions(planned(self.trainer), 1, self.options.seed)

    def draw(self, batch: Any, temperature: float) -> Routed:
        """The same choices for all tokens, one draw a budget."""
        return self.route(torch.tensor(self.plan), self.generator)

    def guided_loss(self, routed: Routed, batch: Any) -> Tensor:
        """What the surrogate predicts, or what the backbone loses."""
        loss = self.terms(routed)
        return loss + self._language_loss(routed, batch) if self.options.through_backbone else loss

    def _language_loss(self, routed: Routed, batch: Batch) -> Tensor:
        """Mean over the budgets in nats, straight through the backbone; the graph of one budget in memory at a time."""
        choices = routed.probabilities.detach().requires_grad_()
        losses, gradients = [], []
        for index in range(len(choices)):
            with gated(self.backbone, for_all_tokens(choices[index])):
                loss = mean_cross_entropy(self.predictions(batch), batch["labels"])
            gradients.append(torch.autograd.grad(loss, choices)[0][index])
            losses.append(loss.detach())
        self.parts.add("language", torch.stack(losses).mean())
        self.tokens_seen += batch["input_ids"].numel() * self.trainer.world_size
        # a number whose gradient is that of the mean loss
        share = self.share_of_tokens(batch["labels"])
        return share * (routed.probabilities * torch.stack(gradients)).sum() / len(losses)

    def predicted(self, routed: Routed) -> Tensor:
        """Mean loss that the surrogate predicts for what the router chose, in standard deviations of its targets."""
        predicted = functional(self.surrogate, routed.probabilities).mean()
        return (predicted - self.surrogate.centre) / self.surrogate.scale

    def surrogate_error(self) -> Tensor:
        """On random pairs of all that were measured."""
        inputs, targets = self._learned
        chosen = torch.randint(len(targets), (self.options.surrogate_batch_size,), generator=self.generator)
        return self.surrogate.error(inputs[chosen], targets[chosen])

    @cached_property
    def _learned(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all pairs that the surrogate learns from."""
        pairs = self.pairs.select(held_out=False)
        inputs = pairs.one_hot(self.backbone.space).to(self.device)
        return inputs, self.trained.targets(pairs.losses).to(self.device)

    # --- validation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """What the router answers now."""
        if self.trainer.state.fn == "fit":
            self.__dict__.pop("ladder", None)
            self._watch()

    @cached_property
    def ladder(self) -> Ladder:
        """What the router answers, as of the last validation."""
        return build_ladder(
            on_processor(self.router),
            self.backbone.space,
            self.table,
            on_processor(self.surrogate),
            to_nats=self.trained.to_nats,
            full_loss=self.trained.full_loss,
        )

    def _watch(self) -> None:
        self.watch_answers(ladder_answers(self.ladder, self.table, self.validated_budgets), self.table)

    # --- what is kept -------------------------------------------------------------------------------------------

    def files(self) -> dict[str, bytes]:
        """The router with its ladder, and the surrogate with what it learned from."""
        router = TrainedRouter(on_processor(self.router), self.table, self.ladder, settings=self.settings())
        return {SURROGATE: replace(self.trained, pairs=self.pairs).to_bytes(), **router.files()}

    def settings(self) -> dict[str, Any]:
        """As for every router stage, with this one's own."""
        return super().settings() | {"pairs": len(self.pairs)}

    def router_state(self) -> dict[str, Any]:
        """As for every router stage, with the pairs."""
        return super().router_state() | {"pairs": self.pairs.tensors()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.pairs = Pairs.from_tensors(checkpoint["router"]["pairs"])
