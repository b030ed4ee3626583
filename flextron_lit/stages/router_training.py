"""What the stages that train a router share: budgets, the two optimizers, and a gate that may hold the router still."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from flextron_lit.costs import CostTable, Workload
from flextron_lit.routers.noise import Temperature
from flextron_lit.routers.objective import CostPenalty
from flextron_lit.stages.frozen import FrozenStage
from flextron_lit.stages.stage import NonFiniteError
from flextron_lit.stages.watched import WatchedStage


class RouterTraining(FrozenStage, WatchedStage):
    """Base of the router stages.

    Args:
        checkpoint: a Flextron checkpoint.
        cost: which cost budgets are ratios of.
        budgets: ratios at which the router is validated; None means 0.9, 0.8, ..., up to four that can be met.
        temperature: of the Gumbel-softmax.
        penalty: on the cost.
        optimizer: of the router; its learning rate falls to 0 as a cosine.
        surrogate_optimizer: of the surrogate, as it goes on learning.
        surrogate_batch_size: pairs that it learns from in a step.
        seed: of the first weights and the Gumbel noise.
        workload: what FLOPs, KV cache and memory are counted for, where no latency table says so.
        attn_implementation: `sdpa` or `eager`.

    Raises:
        ValueError: if a number is out of range.
    """

    plans = "budgets"
    router: nn.Module
    surrogate: nn.Module
    table: CostTable

    def __init__(
        self,
        checkpoint: str,
        *,
        cost: str,
        budgets: list[float] | None,
        temperature: Temperature,
        penalty: CostPenalty,
        optimizer: OptimizerCallable,
        surrogate_optimizer: OptimizerCallable,
        surrogate_batch_size: int,
        seed: int,
        workload: Workload,
        attn_implementation: str,
    ) -> None:
        super().__init__(checkpoint, workload=workload, attn_implementation=attn_implementation)
        wrong = [budget for budget in budgets or () if not 0 < budget <= 1]
        if wrong:
            raise ValueError(f"a budget is a ratio of the full network's cost, above 0 and at most 1, not {wrong[0]}")
        if surrogate_batch_size < 1:
            raise ValueError(f"surrogate_batch_size must be 1 or more, not {surrogate_batch_size}")
        self.cost, self.budgets, self.temperature, self.penalty = cost, budgets, temperature, penalty
        self.optimizer, self.surrogate_optimizer = optimizer, surrogate_optimizer
        self.surrogate_batch_size, self.seed = surrogate_batch_size, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.router_moves = True
        self.moves = 0
        self.surrogate_learns = False

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
        return self.trainer.global_step / max(1, self.trainer.max_steps)

    # --- set-up -------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """As for every frozen stage.

        Raises:
            ValueError: if the run has no end to plan temperatures for.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer.max_steps < 1:
            raise ValueError("set trainer.max_steps: the temperature and the learning rate fall over the run")

    def router_parameters(self) -> Any:
        """What the router's optimizer is given."""
        return self.router.parameters()

    def configure_optimizers(self) -> Any:
        """The router's, with a cosine schedule, and the surrogate's if it goes on learning."""
        router = self.optimizer(self.router_parameters())
        schedule = {
            "optimizer": router,
            "lr_scheduler": get_cosine_schedule_with_warmup(router, 0, self.trainer.max_steps),
        }
        if not self.surrogate_learns:
            return schedule
        return schedule, {"optimizer": self.surrogate_optimizer(self.surrogate.parameters())}

    def on_fit_start(self) -> None:
        """Find the cost table.

        Raises:
            ValueError: if the cost is not known, or nothing guides the router.
        """
        super().on_fit_start()
        if not (self.without_surrogate or self._loss_terms):
            raise ValueError(
                "nothing guides the router: add callbacks.SurrogateGuidance to trainer.callbacks, or train it through "
                "the backbone"
            )
        self.table = self.cost_table(self.cost)

    # --- one step -----------------------------------------------------------------------------------------------

    def check_plan(self) -> None:
        """Refuse a step without budgets.

        Raises:
            ValueError: naming the callback that draws them.
        """
        if not self.plan:
            raise ValueError("this step has no budgets to train for: add callbacks.BudgetSampling to trainer.callbacks")

    def held(self, loss: Tensor) -> Tensor:
        """The router's loss, or nothing of it while the gate holds the router still.

        Raises:
            NonFiniteError: if it is not a number.
        """
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"stopped before step {self.trainer.global_step + 1}: the router's loss is {loss.item()}"
            )
        self.moves += self.router_moves
        if self.router_moves:
            return loss
        # all parameters take part in every backward pass, or data-parallel ranks would wait for them
        return 0.0 * torch.stack([parameter.sum() for parameter in self.router.parameters()]).sum()

    def step_optimizers(self) -> None:
        """One update of the router, if the gate lets it move, and one of the surrogate."""
        optimizers = self.optimizers()
        router, *others = optimizers if isinstance(optimizers, list) else [optimizers]
        # Lightning counts every step of every optimizer; a step of the run is one step of all of them
        counted = others[0] if others else router
        if not self.router_moves:
            # without gradients an optimizer leaves parameters and momenta as they are
            router.zero_grad()
        if router is not counted:
            router.optimizer.step()
        counted.step()
        for optimizer in (router, *others):
            optimizer.zero_grad()
        schedule = self.lr_schedulers()
        assert schedule is not None
        assert not isinstance(schedule, list)
        schedule.step()

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

    # --- what is kept -------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """As for every stage, with those of all router stages."""
        return super().settings() | {
            "cost": self.cost,
            "table_sha256": self.table.sha256,
            "seed": self.seed,
            "temperature": asdict(self.temperature),
            "penalty": asdict(self.penalty),
            "router_moves": self.moves,
        }

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
