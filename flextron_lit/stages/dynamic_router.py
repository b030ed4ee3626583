"""Stage 4: the dynamic router learns which width to give to every token for a budget (paper, dynamic routers)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from flextron_lit.costs import COUNTED, CostTable
from flextron_lit.elastic.unit_gates import gated
from flextron_lit.losses.by_chunk import mean_cross_entropy
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.routers.budget_prices import Prices, evenly_spaced
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter, InputScale, RoutedPass
from flextron_lit.routers.in_force import in_force
from flextron_lit.routers.noise import Temperature
from flextron_lit.routers.surrogate import TokenSurrogate
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter
from flextron_lit.space import SubNetwork
from flextron_lit.stages.guides import SequenceGuide, SurrogateGuide, TokenGuide, run_both
from flextron_lit.stages.router_training import RouterSettings, RouterTraining, on_processor
from flextron_lit.stages.watched_losses import dynamic_answers, ladder_answers

Guidance = Literal["backbone", "token", "sequence"]
KNOTS = 9


@dataclass(frozen=True, kw_only=True)
class DynamicRouterSettings(RouterSettings):
    """What training a dynamic router can be told."""

    cost: str = "latency"
    """Which cost budgets are ratios of: `latency`, `prefill`, `decode` (with LatencyProfiling), or one that is counted:
    `flops`, `prefill_flops`, `decode_flops`."""
    guidance: Guidance = "backbone"
    """What tells the router how well it chose. `backbone`: training text runs through the network with gates, gradients
    straight through; the best in our first trial (docs/experiments.md). `token`: a surrogate that predicts each token's
    excess loss from its own choices and its hidden state (ours). `sequence`: one of the mean choices of a sequence
    (paper), which cannot tell tokens apart. The last two need callbacks.SurrogateGuidance and run the network forward
    only."""
    block_size: int = 128
    """Tokens of a sequence in training; each has a budget of its own, so short ones show more budgets."""
    batch_size: int = 4
    """Sequences of a step."""
    temperature: Temperature = Temperature(start=2.0, end=0.5)
    """Of the Gumbel-softmax."""
    bias_learning_rate: float = 20.0
    """Times the optimizer's, for the biases that follow the budget: they are few, and must move further than the map of
    the hidden state."""
    surrogate_batch_size: int = 1024
    """Tokens (or sequences) that it learns from in a step."""
    rank: int = 16
    """Directions of the hidden state in a token surrogate."""
    hidden: int = 64
    """Width of a token surrogate's MLP."""
    memory: int = 16384
    """Tokens (or sequences) that the surrogate learns from: the last ones."""
    calibration_tokens: int = 4096
    """Training tokens that prices are found on."""
    calibration_batch_size: int = 4
    """Blocks that run at once."""
    prices: int = 7
    """Budgets whose prices are stored, beside the validated ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.guidance not in get_args(Guidance):
            raise ValueError(f"guidance is one of {', '.join(get_args(Guidance))}, not {self.guidance!r}")
        self.check_counts("block_size", "batch_size", "rank", "hidden", "memory")
        self.check_counts("calibration_tokens", "calibration_batch_size")
        if self.prices < 2:
            raise ValueError(f"prices counts budgets, of which interpolation needs 2 or more, not {self.prices}")
        if self.bias_learning_rate <= 0:
            raise ValueError(f"bias_learning_rate must be above 0, not {self.bias_learning_rate}")


class DynamicRouterTraining(RouterTraining):
    """Train a router that chooses for every token.

    A step: every sequence of the batch gets one of the budgets that BudgetSampling planned; each block's router draws
    hard choices from the token's own hidden state; the guide's loss of them, the penalty on their mean cost, one
    update. The stage ends with the prices of budgets, found on a calibration mix.

    Args:
        checkpoint: a Flextron checkpoint with a static router, from whose answers this one starts.
        optimizer: of the router; its learning rate falls to 0 as a cosine.
        surrogate_optimizer: of the surrogate.
        settings: the fields of `DynamicRouterSettings`.

    Raises:
        ValueError: if a number is out of range.
    """

    dynamic = True
    recorded = (
        *RouterTraining.recorded,
        *("guidance", "block_size", "batch_size", "rank", "hidden", "bias_learning_rate", "calibration_tokens"),
    )
    options: DynamicRouterSettings
    router: DynamicRouter
    guide: SurrogateGuide
    """There is none where the backbone itself says how well the router chose."""

    def __init__(
        self,
        checkpoint: str,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        surrogate_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
        **settings: Any,
    ) -> None:
        super().__init__(checkpoint, optimizer, surrogate_optimizer, DynamicRouterSettings(**settings))
        self.prices = Prices(())
        self._priced_at: int | None = None

    # --- contracts with callbacks.SurrogateGuidance -------------------------------------------------------------

    @property
    def without_surrogate(self) -> str | None:
        """The setting that makes a surrogate useless; None if one guides the router."""
        return "guidance: backbone" if self.options.guidance == "backbone" else None

    def observe(self, count: int, generator: torch.Generator) -> Sequence[tuple[float, float]]:
        """Tokens (or sequences) of the last step, predicted before the surrogate learned from them."""
        fresh = self.guide.fresh
        return [fresh[index] for index in torch.randperm(len(fresh), generator=generator)[:count].tolist()]

    @property
    def observed(self) -> int:
        """Tokens (or sequences) that the surrogate learns from."""
        return len(self.guide.memory)

    def predicted(self, routed: RoutedPass) -> Tensor:
        """Mean loss that the surrogate predicts for what the router chose, in standard deviations of its targets."""
        return self.guide.predicted(routed)

    # --- set-up -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load the frozen backbone and the static router to start from, make the router."""
        folder = self.load_frozen()
        space, hidden_size = self.backbone.space, self.backbone.model.config.hidden_size
        self.static = self._static(folder)
        self.router = DynamicRouter(space, hidden_size, torch.linspace(0, 1, KNOTS))
        if not self.without_surrogate:
            self.guide = self._guide(folder)
            self.surrogate = self.guide.surrogate
        if self.trainer.state.fn != "fit":
            found = self.trained_one(TrainedDynamicRouter.read_all(folder, space), "dynamic router")
            self.router, self.table, self.prices = found.network, found.table, found.prices
            self._watch()

    def _guide(self, folder: Path) -> SurrogateGuide:
        space, options = self.backbone.space, self.options
        if options.guidance == "token":
            generator, config = torch.Generator().manual_seed(options.seed), self.backbone.model.config
            surrogate = TokenSurrogate(space, config.hidden_size, options.rank, options.hidden, generator)
            return TokenGuide(surrogate, options.memory)
        trained = self.read_surrogate(folder, "surrogate to start from")
        return SequenceGuide(trained.network, options.memory, trained.target)

    def _static(self, folder: Path) -> TrainedRouter:
        """The static router for the same cost, else any."""
        space = self.backbone.space
        routers = in_force(TrainedRouter.read_all(folder, space), folder, space)
        if not routers:
            raise ValueError(
                f"{folder} holds no static router, from whose answers a dynamic one starts: run the static router "
                "stage first (configs/stages/static_router.yaml)"
            )
        return next((router for router in routers if router.table.name == self.options.cost), routers[0])

    def router_parameters(self) -> Any:
        """The map of the hidden state, and the biases with a learning rate of their own."""
        rate = self.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]
        return [
            {"params": [self.router.weight]},
            {"params": [self.router.bias], "lr": rate * self.options.bias_learning_rate},
        ]

    def on_fit_start(self) -> None:
        """Find the cost table, and start from the static router's answers; a resumed run has them."""
        super().on_fit_start()
        tokens, batch_size = self.options.calibration_tokens, self.options.calibration_batch_size
        batches = self.text.calibration_batches(tokens, batch_size=batch_size)
        self._calibration = [{k: v.to(self.device) for k, v in batch.items()} for batch in batches]
        if self.trainer.ckpt_path is not None:
            return
        budgets = torch.linspace(self.table.smallest_ratio, 1.0, KNOTS)
        self.router.budgets.copy_(budgets)
        answers = [self._static_answer(budget) for budget in budgets.tolist()]
        self.router.start(answers, self.backbone.space, *self._input_scale())

    def _static_answer(self, budget: float) -> Any:
        """The best of the static ladder that costs no more than a budget when it runs dynamically."""
        rungs = self.static.ladder.rungs
        paid = [rung for rung in rungs if self.table.ratio(rung.sub_network) <= budget]
        return (paid[-1] if paid else rungs[0]).sub_network

    @torch.no_grad()
    def _input_scale(self) -> tuple[Tensor, Tensor]:
        scale = InputScale(self.backbone.space)
        with self.forward_context(), self.backbone.use(scale):
            self.predictions(self._calibration[0])
        return scale.mean_and_std()

    @property
    def blocks(self) -> int:
        """Sequences of a batch of this process."""
        return self.options.batch_size

    # --- training -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        """Training text in short sequences, each with a budget of its own."""
        return self.text.train_dataloader(block_size=self.options.block_size, batch_size=self.options.batch_size)

    def draw(self, batch: Batch, temperature: float) -> RoutedPass:
        """What will choose for every token."""
        budgets, (rank, ranks) = self._budgets(len(batch["labels"])), self.place
        return RoutedPass(self.router, budgets, self.generator, temperature, rank, ranks)

    def guided_loss(self, routed: RoutedPass, batch: Batch) -> Tensor:
        """What the surrogate predicts, or what the backbone loses."""
        self.tokens_seen += batch["labels"].numel() * self.trainer.world_size
        if self.without_surrogate:
            with gated(self.backbone, routed.probabilities):
                loss = mean_cross_entropy(self.predictions(batch), batch["labels"])
            self.parts.add("language", loss)
            return loss * self.share_of_tokens(batch["labels"])
        seen = run_both(self, routed, batch)
        self.guide.see(seen, routed.chosen.detach(), self.trainer.world_size)
        self.parts.add("language", seen.losses.sum() / seen.counted.sum().clamp(min=1))
        return self.terms(routed)

    def _budgets(self, sequences: int) -> Tensor:
        """One of the planned budgets for every sequence of this process.

        Raises:
            ValueError: if there are more budgets than sequences of all processes.
        """
        rank, ranks = self.place
        sequences *= ranks
        if len(self.plan) > sequences:
            raise ValueError(
                f"callbacks.BudgetSampling plans {len(self.plan)} budgets, but a batch has {sequences} sequences, one "
                "budget each: lower k, or raise model.init_args.batch_size"
            )
        order = torch.randperm(sequences, generator=self.generator)
        return torch.tensor([self.plan[i % len(self.plan)] for i in order[rank::ranks].tolist()])

    def surrogate_error(self) -> Tensor:
        """On random rows of the memory."""
        return self.guide.error(self.options.surrogate_batch_size, self.generator)

    # --- prices -------------------------------------------------------------------------------------------------

    def _prices_of(self, budgets: Sequence[float]) -> Prices:
        guesses: dict[float, float | None] = dict.fromkeys(budgets)
        return self.find_prices(on_processor(self.router), self.table, guesses, self._calibration)

    def on_train_end(self) -> None:
        """Find all prices, where no validation did after the last step; all ranks take part."""
        if self._priced_at != self.trainer.global_step:
            self._find_all_prices()

    def _find_all_prices(self) -> None:
        self.prices = self._prices_of([*evenly_spaced(self.table, self.options.prices), *self.validated_budgets])
        self._priced_at = self.trainer.global_step

    # --- validation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """What the router chooses now."""
        if self.trainer.state.fn != "fit":
            return
        if self.trainer.should_stop or 0 < self.trainer.max_steps <= self.trainer.global_step:
            # the last table is that of the prices that are stored
            self._find_all_prices()
        else:
            self.prices = self._prices_of(self.validated_budgets)
        self._watch()

    def _watch(self) -> None:
        static, budgets = self.static, self.validated_budgets
        answers: dict[str, SubNetwork | DynamicPolicy] = {}
        if static.table.name == self.table.name:
            paid = [b for b in budgets if b >= static.table.smallest_ratio]
            answers |= ladder_answers(static.ladder, static.table, paid)
        # the stage itself is moved later than its network
        answers |= dynamic_answers(self.trained_router(), budgets, self.backbone.model)
        self.watch_answers(answers, self._costs_of_sub_networks())

    def _costs_of_sub_networks(self) -> CostTable:
        """The same cost as the router's, of sub-networks: one report shows both."""
        name = self.table.name
        if self.static.table.name == name:
            return self.static.table
        # of a latency that no static router was trained for, what they cost as they run here
        return COUNTED[name](self.backbone, self.workload) if name in COUNTED else self.table

    # --- what is kept -------------------------------------------------------------------------------------------

    def trained_router(self) -> TrainedDynamicRouter:
        """The router as it is now, with its prices."""
        return TrainedDynamicRouter(on_processor(self.router), self.table, self.prices, settings=self.settings())

    def files(self) -> dict[str, bytes]:
        """The router."""
        return self.trained_router().files()

    def router_state(self) -> dict[str, Any]:
        """As for every router stage, with what the surrogate learns from."""
        return super().router_state() | {
            "memory": {} if self.without_surrogate else self.guide.memory.columns,
            "fresh": [] if self.without_surrogate else self.guide.fresh,
            "prices": self.prices.to_json(),
            "priced_at": self._priced_at,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        if not self.without_surrogate:
            self.guide.memory.columns = dict(checkpoint["router"]["memory"])
            self.guide.fresh = [(float(p), float(o)) for p, o in checkpoint["router"]["fresh"]]
        self.prices = Prices.from_json(checkpoint["router"]["prices"] or [])
        self._priced_at = checkpoint["router"]["priced_at"]
