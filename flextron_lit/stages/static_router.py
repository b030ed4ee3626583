"""Stage 3: the static router learns which sub-network to take for a budget (paper, static routers)."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from flextron_lit.costs import Workload
from flextron_lit.elastic.gates import for_all_tokens, gated
from flextron_lit.losses import mean_cross_entropy
from flextron_lit.routers.ladder import Ladder, build_ladder
from flextron_lit.routers.noise import Temperature, entropy
from flextron_lit.routers.objective import CostPenalty, Routed, route
from flextron_lit.routers.pairs import Pairs
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.surrogate import Surrogate
from flextron_lit.routers.trained import SURROGATE, TrainedRouter, TrainedSurrogate, read_routers
from flextron_lit.stages.frozen import FrozenStage
from flextron_lit.stages.stage import Batch, LossParts, NonFiniteError
from flextron_lit.stages.watched import WatchedStage
from flextron_lit.validation import ROUTED, typical


class StaticRouterTraining(FrozenStage, WatchedStage):
    """Train a router for one cost, through the surrogate or through the backbone.

    A step: hard choices for the budgets that BudgetSampling planned, the guide's loss of them, the penalty on their
    cost, one update. With callbacks.SurrogateGuidance the surrogate goes on learning from losses measured on the
    router's own choices, and the router moves only while the surrogate is good enough. The stage ends with the ladder.

    Args:
        checkpoint: the Flextron checkpoint that the surrogate stage wrote.
        cost: which cost budgets are ratios of: `latency`, `prefill`, `decode` (with LatencyProfiling), or one that is
            counted: `flops`, `parameters`, `memory`, `kv_bytes`.
        budgets: ratios at which routed sub-networks are validated, beside uniform ones; None means 0.9, 0.8, ..., up to
            four that can be met.
        hidden: width of the router's MLP.
        temperature: of the Gumbel-softmax.
        penalty: on the cost.
        through_backbone: no surrogate guides the router: choices run through the backbone on training text, with
            gradients straight through (the paper argues against it; docs/experiments.md compares).
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
    pairs: Pairs

    def __init__(
        self,
        checkpoint: str,
        cost: str = "latency",
        budgets: list[float] | None = None,
        hidden: int = 128,
        temperature: Temperature = Temperature(),
        penalty: CostPenalty = CostPenalty(),
        through_backbone: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=3e-3),
        surrogate_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1.0),
        surrogate_batch_size: int = 32,
        seed: int = 0,
        workload: Workload = Workload(),
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__(checkpoint, workload=workload, attn_implementation=attn_implementation)
        wrong = [budget for budget in budgets or () if not 0 < budget <= 1]
        if wrong:
            raise ValueError(f"a budget is a ratio of the full network's cost, above 0 and at most 1, not {wrong[0]}")
        if hidden < 1 or surrogate_batch_size < 1:
            raise ValueError(
                f"hidden and surrogate_batch_size must be 1 or more, not {hidden} and {surrogate_batch_size}"
            )
        self.cost, self.budgets, self.hidden = cost, budgets, hidden
        self.temperature, self.penalty, self.through_backbone = temperature, penalty, through_backbone
        self.optimizer, self.surrogate_optimizer = optimizer, surrogate_optimizer
        self.surrogate_batch_size, self.seed = surrogate_batch_size, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.router_moves = True
        self.moves = 0
        self.surrogate_learns = False

    # --- contracts with callbacks -------------------------------------------------------------------------------

    def guide_by_surrogate(self) -> None:
        """Let the surrogate go on learning, a batch of all pairs a step.

        Raises:
            ValueError: if the stage trains through the backbone.
        """
        if self.through_backbone:
            raise ValueError(
                "through_backbone trains the router without a surrogate; take callbacks.SurrogateGuidance out of "
                "trainer.callbacks, or set through_backbone to false"
            )
        self.surrogate_learns = True

    def route(self, budgets: Tensor, generator: torch.Generator) -> Routed:
        """Random hard choices for some budgets [B], at the present temperature."""
        return route(self.router, budgets.to(self.device), generator, self.temperature.at(self.progress))

    def add_pairs(self, pairs: Pairs) -> None:
        """Measured pairs that the surrogate learns from, from now on."""
        self.pairs = self.pairs + pairs
        self.__dict__.pop("_learned", None)

    @property
    def progress(self) -> float:
        """Share of the run that is done, 0 to 1."""
        return self.trainer.global_step / max(1, self.trainer.max_steps)

    # --- set-up -------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the frozen backbone and the surrogate, make the router; idempotent."""
        if hasattr(self, "backbone"):
            return
        folder = self.load_frozen()
        trained = TrainedSurrogate.read(folder, self.backbone.space)
        if trained is None:
            raise ValueError(
                f"{folder} holds no {SURROGATE}: run the surrogate stage first (configs/stages/surrogate.yaml)"
            )
        self.trained = trained
        self.surrogate: Surrogate = trained.network.requires_grad_(self.surrogate_learns)
        self.pairs = trained.pairs
        self.router = StaticRouter(self.backbone.space, self.hidden, torch.Generator().manual_seed(self.seed))
        if self.trainer.state.fn != "fit":
            self._use_trained(folder)

    def _use_trained(self, folder: Path) -> None:
        routers = read_routers(folder, self.backbone.space)
        own = [router for router in routers if router.table.name == self.cost]
        if not own:
            there = ", ".join(router.table.name for router in routers) or "none"
            raise ValueError(
                f"{folder} holds no router for {self.cost}; it has {there}: run `fit` first, or set cost to one of them"
            )
        # of several, for several devices, the one that this run trained
        last = self.history[-1]["settings"].get("table_sha256")
        found = next((router for router in own if router.table.sha256 == last), own[0])
        self.router, self.table = found.network, found.table
        self.__dict__["ladder"] = found.ladder
        self._watch()

    def setup(self, stage: str) -> None:
        """As for every frozen stage.

        Raises:
            ValueError: if the run has no end to plan temperatures for.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer.max_steps < 1:
            raise ValueError("set trainer.max_steps: the temperature and the learning rate fall over the run")

    def configure_optimizers(self) -> Any:
        """The router's, with a cosine schedule, and the surrogate's if it goes on learning."""
        router = self.optimizer(self.router.parameters())
        schedule = {
            "optimizer": router,
            "lr_scheduler": get_cosine_schedule_with_warmup(router, 0, self.trainer.max_steps),
        }
        if not self.surrogate_learns:
            return schedule
        return schedule, {"optimizer": self.surrogate_optimizer(self.surrogate.parameters())}

    def on_fit_start(self) -> None:
        """Find the cost table, and the text that losses are measured on.

        Raises:
            ValueError: if the cost is not known, or nothing guides the router.
        """
        super().on_fit_start()
        if not (self.through_backbone or self._loss_terms):
            raise ValueError(
                "nothing guides the router: add callbacks.SurrogateGuidance to trainer.callbacks, or set "
                "through_backbone to true"
            )
        self.table = self.cost_table(self.cost)
        self.router.scale_to(self.table)
        self.measure_on(self.trained.text, self.trained.settings["measure_batch_size"])

    # --- training -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        """Training text for choices that run through the backbone, else nothing but a count of the steps."""
        if self.through_backbone:
            return self.text.train_dataloader()
        return self.positions(self.trainer.max_steps, 1, self.seed)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One update of the router, if the gate lets it move, and one of the surrogate."""
        if not self.plan:
            raise ValueError("this step has no budgets to train for: add callbacks.BudgetSampling to trainer.callbacks")
        parts = LossParts()
        temperature = self.temperature.at(self.progress)
        routed = self.route(torch.tensor(self.plan), self.generator)
        loss = self._router_loss(routed, batch, parts)
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"stopped before step {self.trainer.global_step + 1}: the router's loss is {loss.item()}"
            )
        if not self.router_moves:
            # all parameters take part in every backward pass, or data-parallel ranks would wait for them
            loss = 0.0 * torch.stack([parameter.sum() for parameter in self.router.parameters()]).sum()
        self.moves += self.router_moves
        if self.surrogate_learns:
            error = self._surrogate_error()
            parts.add("surrogate_error", error)
            loss = loss + error
        self.manual_backward(loss)
        self._step()
        gap = routed.ratios(self.table).detach() - routed.budgets
        metrics = parts.means() | {
            "entropy": entropy(routed.logits).mean().detach(),
            "cost_gap": gap.mean(),
            "temperature": temperature,
        }
        self.log_step({f"train/{name}": value for name, value in metrics.items()})
        self.log_dict(parts.means(), prog_bar=True, logger=False)

    def _router_loss(self, routed: Routed, batch: Any, parts: LossParts) -> Tensor:
        penalty = self.penalty.of(routed.ratios(self.table), routed.budgets)
        parts.add("cost_penalty", penalty)
        loss = penalty + self.terms(routed, parts)
        return loss + self._language_loss(routed, batch, parts) if self.through_backbone else loss

    def _language_loss(self, routed: Routed, batch: Batch, parts: LossParts) -> Tensor:
        """Mean over the budgets in nats, straight through the backbone; the graph of one budget in memory at a time."""
        choices = routed.probabilities.detach().requires_grad_()
        losses, gradients = [], []
        for index in range(len(choices)):
            with gated(self.backbone, for_all_tokens(choices[index])):
                loss = mean_cross_entropy(self.logits(batch), batch["labels"])
            gradients.append(torch.autograd.grad(loss, choices)[0][index])
            losses.append(loss.detach())
        parts.add("language", torch.stack(losses).mean())
        self.tokens_seen += batch["input_ids"].numel() * self.trainer.world_size
        # a number whose gradient is that of the mean loss
        return (routed.probabilities * torch.stack(gradients)).sum() / len(losses)

    def predicted(self, probabilities: Tensor) -> Tensor:
        """The surrogate's answer to choices [B, 2L, N] in standard deviations, [B]; gradients flow into those alone."""
        frozen = {name: value.detach() for name, value in self.surrogate.state_dict(keep_vars=True).items()}
        predicted = torch.func.functional_call(self.surrogate, frozen, (probabilities,))
        return (predicted - self.surrogate.centre) / self.surrogate.scale

    def _surrogate_error(self) -> Tensor:
        inputs, targets = self._learned
        chosen = torch.randint(len(targets), (self.surrogate_batch_size,), generator=self.generator)
        return self.surrogate.error(inputs[chosen], targets[chosen])

    @cached_property
    def _learned(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of all pairs that the surrogate learns from."""
        pairs = self.pairs.select(held_out=False)
        inputs = pairs.one_hot(self.backbone.space).to(self.device)
        return inputs, self.trained.targets(pairs.losses).to(self.device)

    def _step(self) -> None:
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

    # --- validation ---------------------------------------------------------------------------------------------

    def val_dataloader(self) -> Any:
        """Held-out documents, one loader a domain."""
        return self.text.val_dataloader()

    def test_dataloader(self) -> Any:
        """Held-out documents, one loader a domain."""
        return self.text.test_dataloader()

    def predict_dataloader(self) -> Any:
        """Held-out documents, one loader a domain."""
        return self.text.predict_dataloader()

    def on_validation_start(self) -> None:
        """What the router answers now."""
        if self.trainer.state.fn == "fit":
            self.__dict__.pop("ladder", None)
            self._watch()

    @cached_property
    def ladder(self) -> Ladder:
        """What the router answers, as of the last validation."""
        # on the processor: thousands of tiny steps, which a GPU would only wait for
        trained = self.trained_surrogate()
        return build_ladder(
            copy.deepcopy(self.router).cpu(),
            self.backbone.space,
            self.table,
            trained.network,
            to_nats=trained.to_nats,
            full_loss=trained.full_loss,
        )

    def _watch(self) -> None:
        smallest = self.table.smallest_ratio
        budgets = self.budgets if self.budgets is not None else _tenths(smallest)
        if budgets and min(budgets) < smallest:
            raise ValueError(
                f"no sub-network meets the budget {min(budgets)}: the smallest {self.table.name} possible is "
                f"{smallest:.3f} of the full network's"
            )
        space = self.backbone.space
        uniform = {u.name: space.uniform(u.mlp, u.attention) for u in typical(space)}
        routed = {f"{ROUTED}{b:.2f}": self.ladder.at(b * self.table.full).sub_network for b in budgets}
        self.watch({"full": space.full(), **uniform, **routed}, self.table)

    # --- what is kept -------------------------------------------------------------------------------------------

    def trained_surrogate(self) -> TrainedSurrogate:
        """The surrogate as it is now, with all pairs."""
        network = copy.deepcopy(self.surrogate).cpu().requires_grad_(False)
        return replace(self.trained, network=network, pairs=self.pairs)

    def trained_router(self) -> TrainedRouter:
        """The router as it is now, with its ladder."""
        return TrainedRouter(copy.deepcopy(self.router).cpu(), self.table, self.ladder, self.settings())

    def files(self) -> dict[str, bytes]:
        """The router, and the surrogate with what it learned from."""
        return {SURROGATE: self.trained_surrogate().to_bytes(), **self.trained_router().files()}

    def settings(self) -> dict[str, Any]:
        """As for every stage, with this one's own."""
        return super().settings() | {
            "cost": self.cost,
            "table_sha256": self.table.sha256,
            "hidden": self.hidden,
            "seed": self.seed,
            "temperature": asdict(self.temperature),
            "penalty": asdict(self.penalty),
            "through_backbone": self.through_backbone,
            "router_moves": self.moves,
            "pairs": len(self.pairs),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stage, with the pairs and the generator."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["router"] = {
            "pairs": self.pairs.tensors(),
            "generator": self.generator.get_state(),
            "moves": self.moves,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.pairs = Pairs.from_tensors(checkpoint["router"]["pairs"])
        self.generator.set_state(checkpoint["router"]["generator"])
        self.moves = checkpoint["router"]["moves"]


def _tenths(smallest: float) -> list[float]:
    """Up to four budgets below 1 that can be met."""
    return [tenth / 10 for tenth in range(9, 0, -1) if tenth / 10 > smallest][:4]
