"""Stage 4: the dynamic router learns which width to give to every token for a budget (paper, dynamic routers)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from flextron_lit.costs import COUNTED, CostTable, Workload
from flextron_lit.elastic.unit_gates import gated
from flextron_lit.files.ranks import gather
from flextron_lit.losses.cross_entropy import mean_cross_entropy, token_cross_entropy
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter, RoutedPass
from flextron_lit.routers.memory import Memory
from flextron_lit.routers.noise import Temperature
from flextron_lit.routers.objective import CostPenalty
from flextron_lit.routers.pricing import Prices, evenly_spaced
from flextron_lit.routers.scale import InputScale
from flextron_lit.routers.surrogate import encode
from flextron_lit.routers.token_surrogate import TokenSurrogate
from flextron_lit.routers.trained import TrainedRouter, TrainedSurrogate, read_routers
from flextron_lit.routers.trained_dynamic import TrainedDynamicRouter, read_dynamic_routers
from flextron_lit.space import SubNetwork
from flextron_lit.stages.base import Batch, LossParts
from flextron_lit.stages.router_training import RouterTraining, functional, on_processor
from flextron_lit.stages.watched import budgets_to_watch, dynamic_answers, ladder_answers

Guidance = Literal["backbone", "token", "sequence"]
KNOTS = 9


class DynamicRouterTraining(RouterTraining):
    """Train a router that chooses for every token.

    A step: every sequence of the batch gets one of the budgets that BudgetSampling planned; each block's router draws
    hard choices from the token's own hidden state; the guide's loss of them, the penalty on their mean cost, one
    update. The stage ends with the prices of budgets, found on a calibration mix.

    Args:
        checkpoint: a Flextron checkpoint with a static router, from whose answers this one starts.
        cost: which cost budgets are ratios of: `latency`, `prefill`, `decode` (with LatencyProfiling), or one that is
            counted: `flops`, `prefill_flops`, `decode_flops`.
        guidance: what tells the router how well it chose. `backbone`: training text runs through the network with
            gates, gradients straight through; the best in our first trial (docs/experiments.md). `token`: a surrogate
            that predicts each token's excess loss from its own choices and its hidden state (ours). `sequence`: one of
            the mean choices of a sequence (paper), which cannot tell tokens apart. The last two need
            callbacks.SurrogateGuidance and run the network forward only.
        budgets: ratios at which the router is validated; None means 0.9, 0.8, ..., up to four that can be met.
        block_size: tokens of a sequence in training; each has a budget of its own, so short ones show more budgets.
        batch_size: sequences of a step.
        temperature: of the Gumbel-softmax.
        penalty: on the cost.
        optimizer: of the router; its learning rate falls to 0 as a cosine.
        bias_learning_rate: times the optimizer's, for the biases that follow the budget: they are few, and must move
            further than the map of the hidden state.
        surrogate_optimizer: of the surrogate.
        surrogate_batch_size: tokens (or sequences) that it learns from in a step.
        rank: directions of the hidden state in a token surrogate.
        hidden: width of a token surrogate's MLP.
        memory: tokens (or sequences) that the surrogate learns from: the last ones.
        calibration_tokens: training tokens that prices are found on.
        calibration_batch_size: blocks that run at once.
        prices: budgets whose prices are stored, beside the validated ones.
        seed: of the first weights and the Gumbel noise.
        workload: what FLOPs are counted for, where no latency table says so.
        attn_implementation: `sdpa` or `eager`.

    Raises:
        ValueError: if a number is out of range.
    """

    dynamic = True
    router: DynamicRouter

    def __init__(
        self,
        checkpoint: str,
        cost: str = "latency",
        guidance: Guidance = "backbone",
        budgets: list[float] | None = None,
        block_size: int = 128,
        batch_size: int = 4,
        temperature: Temperature = Temperature(start=2.0, end=0.5),
        penalty: CostPenalty = CostPenalty(),
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        bias_learning_rate: float = 20.0,
        surrogate_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
        surrogate_batch_size: int = 1024,
        rank: int = 16,
        hidden: int = 64,
        memory: int = 16384,
        calibration_tokens: int = 4096,
        calibration_batch_size: int = 4,
        prices: int = 7,
        seed: int = 0,
        workload: Workload = Workload(),
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__(
            checkpoint,
            cost=cost,
            budgets=budgets,
            temperature=temperature,
            penalty=penalty,
            optimizer=optimizer,
            surrogate_optimizer=surrogate_optimizer,
            surrogate_batch_size=surrogate_batch_size,
            seed=seed,
            workload=workload,
            attn_implementation=attn_implementation,
        )
        if guidance not in get_args(Guidance):
            raise ValueError(f"guidance is one of {', '.join(get_args(Guidance))}, not {guidance!r}")
        numbers = {
            "block_size": block_size,
            "batch_size": batch_size,
            "rank": rank,
            "hidden": hidden,
            "memory": memory,
            "calibration_tokens": calibration_tokens,
            "calibration_batch_size": calibration_batch_size,
        }
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} must be 1 or more, not {number}")
        if prices < 2:
            raise ValueError(f"prices counts budgets, of which interpolation needs 2 or more, not {prices}")
        if bias_learning_rate <= 0:
            raise ValueError(f"bias_learning_rate must be above 0, not {bias_learning_rate}")
        self.guidance, self.bias_learning_rate = guidance, bias_learning_rate
        self.block_size, self.batch_size = block_size, batch_size
        self.rank, self.hidden, self.num_prices = rank, hidden, prices
        self.calibration_tokens, self.calibration_batch_size = calibration_tokens, calibration_batch_size
        self.memory = Memory(memory)
        self.prices: Prices | None = None
        self._priced_at: int | None = None
        self._fresh: list[tuple[float, float]] = []
        self._states: Tensor | None = None
        self._resumed = False

    # --- contracts with callbacks.SurrogateGuidance -------------------------------------------------------------

    @property
    def without_surrogate(self) -> str | None:
        """The setting that makes a surrogate useless; None if one guides the router."""
        return "guidance: backbone" if self.guidance == "backbone" else None

    def observe(self, count: int, generator: torch.Generator) -> Sequence[tuple[float, float]]:
        """Tokens (or sequences) of the last step, predicted before the surrogate learned from them."""
        chosen = torch.randperm(len(self._fresh), generator=generator)[:count].tolist()
        return [self._fresh[index] for index in chosen]

    @property
    def observed(self) -> int:
        """Tokens (or sequences) that the surrogate learns from."""
        return len(self.memory)

    def predicted(self, routed: RoutedPass) -> Tensor:
        """Mean loss that the surrogate predicts for what the router chose, in standard deviations of its targets."""
        inputs = self._inputs(routed.chosen)
        return functional(self.surrogate, *inputs).mean() / self._scale

    @property
    def _scale(self) -> Tensor:
        scale = self.surrogate.scale
        assert isinstance(scale, Tensor)
        return scale

    # --- set-up -------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Load the frozen backbone and the static router to start from, make the router."""
        folder = self.load_frozen()
        space, hidden_size = self.backbone.space, self.backbone.model.config.hidden_size
        self.static = self._static(folder)
        self.router = DynamicRouter(space, hidden_size, torch.linspace(0, 1, KNOTS))
        generator = torch.Generator().manual_seed(self.seed)
        if self.guidance == "token":
            self.surrogate = TokenSurrogate(space, hidden_size, self.rank, self.hidden, generator)
        if self.guidance == "sequence":
            trained = TrainedSurrogate.read(folder, space)
            if trained is None:
                raise ValueError(f"{folder} holds no surrogate to start from: run the surrogate stage first")
            if self.trainer.state.fn == "fit":
                trained.refuse_stale(folder)
            self.target = trained.target
            self.surrogate = trained.network
        if self.trainer.state.fn != "fit":
            self._use_trained(folder)

    def _static(self, folder: Path) -> TrainedRouter:
        """The static router for the same cost, else any."""
        routers = read_routers(folder, self.backbone.space)
        if not routers:
            raise ValueError(
                f"{folder} holds no static router, from whose answers a dynamic one starts: run the static router "
                "stage first (configs/stages/static_router.yaml)"
            )
        return next((router for router in routers if router.table.name == self.cost), routers[0])

    def _use_trained(self, folder: Path) -> None:
        found = self.trained_one(read_dynamic_routers(folder, self.backbone.space), "dynamic router")
        self.router, self.table, self.prices = found.network, found.table, found.prices
        self._watch()

    def router_parameters(self) -> Any:
        """The map of the hidden state, and the biases with a learning rate of their own."""
        rate = self.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"]
        return [
            {"params": [self.router.weight]},
            {"params": [self.router.bias], "lr": rate * self.bias_learning_rate},
        ]

    def on_fit_start(self) -> None:
        """Find the cost table, and start from the static router's answers; a resumed run has them."""
        super().on_fit_start()
        batches = self.text.calibration_batches(self.calibration_tokens, batch_size=self.calibration_batch_size)
        self._calibration = [{k: v.to(self.device) for k, v in batch.items()} for batch in batches]
        if self._resumed:
            return
        low, high = self.table.smallest_ratio, 1.0
        budgets = torch.linspace(low, high, KNOTS)
        self.router.budgets.copy_(budgets)
        answers = [self._static_answer(budget) for budget in budgets.tolist()]
        mean, std = self._input_scale()
        self.router.start(answers, self.backbone.space, mean, std)

    def _static_answer(self, budget: float) -> Any:
        """The best of the static ladder that costs no more than a budget when it runs dynamically."""
        rungs = self.static.ladder.rungs
        paid = [rung for rung in rungs if self.table.ratio(rung.sub_network) <= budget]
        return (paid[-1] if paid else rungs[0]).sub_network

    @torch.no_grad()
    def _input_scale(self) -> tuple[Tensor, Tensor]:
        scale = InputScale(self.backbone.space)
        with self.forward_context(), self.backbone.use(scale):
            self.logits(self._calibration[0])
        return scale.mean_and_std()

    # --- training -----------------------------------------------------------------------------------------------

    def train_dataloader(self) -> Any:
        """Training text in short sequences, each with a budget of its own."""
        return self.text.train_dataloader(block_size=self.block_size, batch_size=self.batch_size)

    def draw(self, batch: Batch, temperature: float) -> RoutedPass:
        """What will choose for every token."""
        return RoutedPass(self.router, self._budgets(len(batch["labels"])), self.generator, temperature)

    def guided_loss(self, routed: RoutedPass, batch: Batch, parts: LossParts) -> Tensor:
        """What the surrogate predicts, or what the backbone loses."""
        guide = self._through_backbone if self.guidance == "backbone" else self._through_surrogate
        loss = guide(routed, batch, parts)
        self.tokens_seen += batch["labels"].numel() * self.trainer.world_size
        return loss

    def _budgets(self, sequences: int) -> Tensor:
        """One of the planned budgets for every sequence.

        Raises:
            ValueError: if there are more budgets than sequences.
        """
        if len(self.plan) > sequences:
            raise ValueError(
                f"callbacks.BudgetSampling plans {len(self.plan)} budgets, but a batch has {sequences} sequences, one "
                "budget each: lower k, or raise model.init_args.batch_size"
            )
        order = torch.randperm(sequences, generator=self.generator)
        return torch.tensor([self.plan[i % len(self.plan)] for i in order.tolist()])

    def _through_backbone(self, routed: RoutedPass, batch: Batch, parts: LossParts) -> Tensor:
        with gated(self.backbone, routed.probabilities):
            loss = mean_cross_entropy(self.logits(batch), batch["labels"])
        parts.add("language", loss)
        return loss

    def _through_surrogate(self, routed: RoutedPass, batch: Batch, parts: LossParts) -> Tensor:
        """Forward passes of the full network and of what was chosen; then what the surrogate says of the choices."""
        with torch.no_grad():
            full, predicted = self._observed_full(batch)
            with self.backbone.use(routed):
                observed, _ = token_cross_entropy(self.logits(batch), batch["labels"])
        self._predicted = predicted
        inputs = self._inputs(routed.chosen.detach())
        targets = self._targets(observed, full)
        if not self.memory.columns and not self._resumed and self.guidance == "token":
            self._scale.copy_(self._over_ranks(targets).std().clamp(min=1e-6))
        with torch.no_grad():
            known = self.surrogate(*inputs)
        rows = {f"input{i}": self._over_ranks(value.detach()) for i, value in enumerate(inputs)}
        targets, known = self._over_ranks(targets), self._over_ranks(known)
        self.memory.add({**rows, "target": targets})
        self._fresh = list(zip(known.tolist(), targets.tolist(), strict=True))
        parts.add("language", observed.sum() / predicted.sum().clamp(min=1))
        return torch.as_tensor(self.terms(routed, parts))

    def _observed_full(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The full network's loss of every token [B, T - 1], which of them count, and (kept) its last hidden states."""
        head = self.backbone.model.get_output_embeddings()

        def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._states = inputs[0][:, :-1].float()

        hook = head.register_forward_pre_hook(keep)
        try:
            with self.backbone.use(self.backbone.space.full()):
                return token_cross_entropy(self.logits(batch), batch["labels"])
        finally:
            hook.remove()

    def _inputs(self, chosen: Tensor) -> tuple[Tensor, ...]:
        """What the surrogate reads of choices [B, T, 2L, N]: those of predicted tokens and their states, or means."""
        counted, chosen = self._predicted, chosen[:, :-1]
        if self.guidance == "token":
            assert self._states is not None
            return chosen[counted], self._states[counted]
        weights = counted / counted.sum(1, keepdim=True).clamp(min=1)
        return ((weights[..., None, None] * chosen).sum(1),)

    def _targets(self, observed: Tensor, full: Tensor) -> Tensor:
        """Excess loss of every predicted token in nats, or the surrogate's target for every sequence."""
        if self.guidance == "token":
            return (observed - full)[self._predicted]
        tokens = self._predicted.sum(1).clamp(min=1)
        ours, theirs = observed.sum(1) / tokens, full.sum(1) / tokens
        return ours if self.target == "loss" else encode(self.target, ours - theirs, 0.0)

    def _over_ranks(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, so that every rank learns the same."""
        if self.trainer.world_size == 1:
            return rows
        return torch.cat(gather(rows.cpu(), self.trainer.world_size)).to(rows.device)

    def surrogate_error(self) -> Tensor:
        """On random rows of the memory."""
        rows = self.memory.sample(self.surrogate_batch_size, self.generator)
        inputs = [rows[name] for name in sorted(rows) if name.startswith("input")]
        return ((self.surrogate(*inputs) - rows["target"]) / self._scale).square().mean()

    # --- prices -------------------------------------------------------------------------------------------------

    def _prices_of(self, budgets: Sequence[float]) -> Prices:
        guesses: dict[float, float | None] = dict.fromkeys(budgets)
        return self.find_prices(on_processor(self.router), self.table, guesses, self._calibration)

    def on_train_end(self) -> None:
        """Find all prices, where no validation did after the last step; all ranks take part."""
        if self._priced_at != self.trainer.global_step:
            self._find_all_prices()

    def _find_all_prices(self) -> None:
        self.prices = self._prices_of([*evenly_spaced(self.table, self.num_prices), *self._validated()])
        self._priced_at = self.trainer.global_step

    # --- validation ---------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """What the router chooses now."""
        if self.trainer.state.fn != "fit":
            return
        if self.trainer.global_step >= self.trainer.max_steps:
            # the last table is that of the prices that are stored
            self._find_all_prices()
        else:
            self.prices = self._prices_of(self._validated())
        self._watch()

    def _validated(self) -> list[float]:
        return budgets_to_watch(self.budgets, self.table)

    def _watch(self) -> None:
        assert self.prices is not None
        static, budgets = self.static, self._validated()
        answers: dict[str, SubNetwork | DynamicPolicy] = {}
        if static.table.name == self.table.name:
            paid = [b for b in budgets if b >= static.table.smallest_ratio]
            answers |= ladder_answers(static.ladder, static.table, paid)
        now = TrainedDynamicRouter(on_processor(self.router), self.table, self.prices)
        # the stage itself is moved later than its network
        answers |= dynamic_answers(now, budgets, self.backbone.model)
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
        assert self.prices is not None
        return TrainedDynamicRouter(on_processor(self.router), self.table, self.prices, self.settings())

    def files(self) -> dict[str, bytes]:
        """The router."""
        return self.trained_router().files()

    def settings(self) -> dict[str, Any]:
        """As for every router stage, with this one's own."""
        names = ("guidance", "block_size", "batch_size", "rank", "hidden", "bias_learning_rate", "calibration_tokens")
        return super().settings() | {name: getattr(self, name) for name in names}

    def router_state(self) -> dict[str, Any]:
        """As for every router stage, with what the surrogate learns from."""
        return super().router_state() | {
            "memory": self.memory.columns,
            "fresh": self._fresh,
            "prices": self.prices.to_json() if self.prices else None,
            "priced_at": self._priced_at,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Inverse of `on_save_checkpoint`."""
        super().on_load_checkpoint(checkpoint)
        self.memory.columns = dict(checkpoint["router"]["memory"])
        self._fresh = [(float(p), float(o)) for p, o in checkpoint["router"]["fresh"]]
        prices = checkpoint["router"]["prices"]
        self.prices = Prices.from_json(prices) if prices else None
        self._priced_at = checkpoint["router"]["priced_at"]
        self._resumed = True
