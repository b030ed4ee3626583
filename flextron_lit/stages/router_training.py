"""What the stages that train a router share: budgets, the two optimizers, and a gate that may hold the router still."""

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from flextron_lit.costs import CostTable
from flextron_lit.files.digest import fingerprint
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.routers.noise import Temperature, entropy
from flextron_lit.routers.objective import CostPenalty
from flextron_lit.routers.trained import KeptRouter
from flextron_lit.space import SubNetwork
from flextron_lit.stages.frozen_stage import FrozenSettings, FrozenStage
from flextron_lit.stages.loss_parts import LossParts
from flextron_lit.stages.ranks_together import zero_of
from flextron_lit.stages.run_length import by_the_clock, clock, planned, updates_done
from flextron_lit.stages.watched_losses import WatchedStage, budgets_to_watch, check_budgets

Trained = TypeVar("Trained", bound=KeptRouter)


@dataclass(frozen=True, kw_only=True)
class RouterSettings(FrozenSettings):
    """What all router stages can be told."""

    cost: str = "latency"
    """Which cost budgets are ratios of: `latency`, `prefill`, `decode` (with LatencyProfiling), or one that is counted:
    `flops`, `parameters`, `memory`, `kv_bytes`."""
    budgets: list[float] | None = None
    """Ratios at which routed sub-networks are validated, beside uniform ones; None means 0.9, 0.8, ..., up to four that
    can be met."""
    temperature: Temperature = Temperature()
    """Of the Gumbel-softmax."""
    penalty: CostPenalty = CostPenalty()
    """On the cost."""
    surrogate_batch_size: int = 32
    """Pairs that it learns from in a step."""
    seed: int = 0
    """Of the first weights and the Gumbel noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budgets(self.budgets)
        self.check_counts("surrogate_batch_size")


class RouterTraining(FrozenStage, WatchedStage):
    """Base of the router stages.

    Args:
        checkpoint: a Flextron checkpoint.
        optimizer: of the router; its learning rate falls to 0 as a cosine.
        surrogate_optimizer: of the surrogate, as it goes on learning.
        options: how the router is trained.
    """

    plans = "budgets"
    recorded = (*FrozenStage.recorded, "cost", "seed", "temperature", "penalty")
    options: RouterSettings
    router: nn.Module
    surrogate: nn.Module
    table: CostTable

    def __init__(
        self,
        checkpoint: str,
        optimizer: OptimizerCallable,
        surrogate_optimizer: OptimizerCallable,
        options: RouterSettings,
    ) -> None:
        super().__init__(checkpoint, options)
        self.optimizer, self.surrogate_optimizer = optimizer, surrogate_optimizer
        self.generator = torch.Generator().manual_seed(options.seed)
        self.router_moves = True
        self.moves = 0
        self.surrogate_learns = False
        self._losses: dict[Hashable, tuple[Tensor, Tensor]] = {}

    # --- contracts with callbacks.SurrogateGuidance -------------------------------------------------------------

    @property
    def without_surrogate(self) -> str | None:
        """The setting that makes a surrogate useless; None if one guides the router."""
        return None

    def guide_by_surrogate(self) -> None:
        """Let the surrogate go on learning, a batch a step.

        Raises:
            ValueError: if the stage trains without one.
        """
        if self.without_surrogate:
            raise ValueError(
                f"{self.without_surrogate} trains the router without a surrogate; take callbacks.SurrogateGuidance out "
                "of trainer.callbacks, or change that setting"
            )
        self.surrogate_learns = True

    def predicted(self, routed: Any) -> Tensor:
        """Mean loss that the surrogate predicts for what the router chose, in standard deviations of its targets."""
        raise NotImplementedError

    def observe(self, count: int, generator: torch.Generator) -> Sequence[tuple[float, float]]:
        """Predicted and observed targets of the router's own choices, which the surrogate has not learned from yet.

        Args:
            count: how many are wanted; there may be fewer.
            generator: source of draws.
        """
        raise NotImplementedError

    @property
    def observed(self) -> int:
        """Pairs that the surrogate learns from."""
        raise NotImplementedError

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return updates_done(self.trainer) / planned(self.trainer)

    # --- set-up -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """As for every frozen stage.

        Raises:
            ValueError: if the run has no end to plan temperatures for.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer.max_steps < 1 and clock(self.trainer) is None:
            raise ValueError(
                "set trainer.max_steps, or max_time alone: the temperature and the learning rate fall over the run"
            )

    def router_parameters(self) -> Any:
        """What the router's optimizer is given."""
        return self.router.parameters()

    def trained_one(self, routers: Sequence[Trained], name: str) -> Trained:
        """Of a checkpoint's routers the one for this cost; of several, for several devices, the last one trained.

        Args:
            routers: all of the kind.
            name: of the kind.

        Raises:
            ValueError: if there is none.
        """
        cost = self.options.cost
        own = [router for router in routers if router.table.name == cost]
        if not own:
            there = ", ".join(router.table.name for router in routers) or "none"
            raise ValueError(
                f"{self.flextron_folder()} holds no {name} for {cost}; it has {there}: run `fit` first, or set cost "
                "to one of them"
            )
        last = self.history[-1]["settings"].get("table_sha256")
        return next((router for router in own if router.table.sha256 == last), own[0])

    def configure_optimizers(self) -> Any:
        """The router's, with a cosine schedule, and the surrogate's if it goes on learning."""
        router = self.optimizer(self.router_parameters())
        cosine = get_cosine_schedule_with_warmup(router, 0, planned(self.trainer))
        schedule = {"optimizer": router, "lr_scheduler": by_the_clock(cosine, self.trainer)}
        if not self.surrogate_learns:
            return schedule
        return schedule, {"optimizer": self.surrogate_optimizer(self.surrogate.parameters())}

    def on_fit_start(self) -> None:
        """Find the cost table.

        Raises:
            ValueError: if the cost is not known, or nothing guides the router.
        """
        if not (self.without_surrogate or self._loss_terms):
            raise ValueError(
                "nothing guides the router: add callbacks.SurrogateGuidance to trainer.callbacks, or train it through "
                "the backbone"
            )
        self.table = self.cost_table(self.options.cost)

    # --- one step -----------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One update of the router, if the gate lets it move, and one of the surrogate."""
        self.check_plan()
        self.parts = LossParts()
        temperature = self.options.temperature.at(self.progress)
        routed = self.draw(batch, temperature)
        loss = self.guided_loss(routed, batch)
        ratios = routed.ratios(self.table)
        penalty = self.options.penalty.of(ratios, routed.budgets)
        self.parts.add("cost_penalty", penalty)
        loss = self.held(loss + penalty)
        if self.surrogate_learns:
            error = self.surrogate_error()
            self.parts.add("surrogate_error", error)
            loss = loss + error
        self.manual_backward(loss)
        self.reduce_gradients()
        self.step_optimizers()
        metrics = self.parts.means() | {
            "entropy": entropy(routed.logits.detach()).mean(),
            "cost_gap": (ratios.detach() - routed.budgets).mean(),
            "temperature": temperature,
        }
        self.log_step({f"train/{name}": value for name, value in metrics.items()})
        self.log_dict(self.parts.means(), prog_bar=True, logger=False)

    def draw(self, batch: Any, temperature: float) -> Any:
        """Random hard choices for the planned budgets; a dynamic router's are made as the pass runs."""
        raise NotImplementedError

    def guided_loss(self, routed: Any, batch: Any) -> Tensor:
        """The guide's loss of the choices, with the callbacks' terms."""
        raise NotImplementedError

    def surrogate_error(self) -> Tensor:
        """Mean squared error of the surrogate over the variance of its targets, on pairs that it knows."""
        raise NotImplementedError

    def held(self, loss: Tensor) -> Tensor:
        """The router's loss, or nothing of it while the gate holds the router still.

        Raises:
            NonFiniteError: if it is not a number.
        """
        self.check_finite({"the router's loss": loss})
        self.moves += self.router_moves
        return loss if self.router_moves else zero_of(self.router)

    def step_optimizers(self) -> None:
        """As for every stage, but for a router that the gate holds still."""
        if not self.router_moves:
            # without gradients an optimizer leaves parameters and momenta as they are
            self.trainer.optimizers[0].zero_grad()
        super().step_optimizers()

    # --- loaders ------------------------------------------------------------------------------------------------

    def val_dataloader(self) -> Any:
        """Held-out documents, one loader a domain."""
        return self.text.val_dataloader()

    def test_dataloader(self) -> Any:
        """Held-out documents, one loader a domain."""
        return self.text.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Held-out documents, one loader a domain."""
        return self.text.predict_dataloader()

    # --- validation ---------------------------------------------------------------------------------------------

    @property
    def validated_budgets(self) -> list[float]:
        """Budgets at which the router is validated."""
        return budgets_to_watch(self.options.budgets, self.table)

    def measured(self, selection: SubNetwork | DynamicPolicy, batch: Batch) -> tuple[Tensor, Tensor]:
        """As for every watched stage; the network is frozen, so a sub-network is run once on the same tokens."""
        if not isinstance(selection, SubNetwork):
            return super().measured(selection, batch)
        place = (selection, fingerprint([batch]), str(self.trainer.precision))
        if place not in self._losses:
            self._losses[place] = super().measured(selection, batch)
        return self._losses[place]

    # --- what is kept -------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """As for every stage, with those of all router stages."""
        return super().settings() | {"table_sha256": self.table.sha256, "router_moves": self.moves}

    def router_state(self) -> dict[str, Any]:
        """What a run that resumes needs beside weights and optimizers."""
        return {"generator": self.generator.get_state(), "moves": self.moves}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the router's."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["router"] = self.router_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.generator.set_state(checkpoint["router"]["generator"])
        self.moves = checkpoint["router"]["moves"]


def functional(module: nn.Module, *inputs: Tensor) -> Tensor:
    """A module's answer with gradients into the inputs and none into its weights."""
    frozen = {name: value.detach() for name, value in module.state_dict(keep_vars=True).items()}
    answer: Tensor = torch.func.functional_call(module, frozen, inputs)
    return answer


def on_processor(module: nn.Module) -> Any:
    """A copy for files and for thousands of tiny steps, which a GPU would only wait for."""
    return copy.deepcopy(module).cpu().requires_grad_(False)
