"""What joint tuning has to know of a kind of router: how it runs in a step, what it answers, how it is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from flextron_lit.costs import CostTable
from flextron_lit.elastic.unit_gates import Choose, for_all_tokens
from flextron_lit.losses.measured_loss import batches_of
from flextron_lit.routers.budget_prices import Prices
from flextron_lit.routers.dynamic import DynamicPolicy, RoutedPass
from flextron_lit.routers.in_force import in_force
from flextron_lit.routers.ladder import Ladder, candidates, measured_ladder, worth_measuring
from flextron_lit.routers.objective import Routed, route
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter
from flextron_lit.space import ElasticSpace, SubNetwork
from flextron_lit.stages.loss_measuring import MeasuringStage
from flextron_lit.stages.router_training import on_processor
from flextron_lit.stages.validation import DYNAMIC, ROUTED
from flextron_lit.stages.watched_losses import dynamic_answers, ladder_answers

RouterKind = Literal["static", "dynamic"]
Tuned = Literal["static", "dynamic", "both"]
TUNED: tuple[Tuned, ...] = get_args(Tuned)
BIAS_LEARNING_RATE = "bias_learning_rate"
"""In a dynamic router's settings: times the learning rate of its map."""


@dataclass(frozen=True, kw_only=True)
class Remeasuring:
    """How a router's answers are measured again once training has changed the network."""

    candidates: int = 40
    """Sub-networks that are measured for a static router's ladder: as many of its answers to evenly spaced budgets as
    rungs of the ladder before, and answers of the excess losses. Losses of those in between are interpolated."""
    tokens: int = 1536
    """Training tokens that each is measured on, and that a dynamic router's prices are found on."""
    block_size: int = 256
    """Tokens of a block: short ones show more documents."""
    batch_size: int = 4
    """Blocks that run at once."""

    def __post_init__(self) -> None:
        if self.candidates < 6:
            raise ValueError(f"remeasuring.candidates must be 6 or more, not {self.candidates}")
        if min(self.tokens, self.block_size, self.batch_size) < 1:
            raise ValueError(
                "remeasuring.tokens, block_size and batch_size must be 1 or more, not "
                f"{self.tokens}, {self.block_size}, {self.batch_size}"
            )


@dataclass(frozen=True)
class Drawn:
    """What a router drew for one budget, to run in one pass."""

    routed: Routed | RoutedPass
    """Logits and cost ratios, with gradients; of a dynamic router once the pass has run."""
    choose: Choose
    """Straight-through choices, for gates."""
    selection: SubNetwork | RoutedPass
    """The same choices, to run without gates."""


class TunedStaticRouter:
    """A static router that is tuned together with the backbone; its answers are its ladder.

    Args:
        trained: as the checkpoint holds it.
        space: the choices.
    """

    kind: RouterKind = "static"
    prefix = ROUTED
    """How the names of its losses and answers begin."""

    def __init__(self, trained: TrainedRouter, space: ElasticSpace) -> None:
        self.trained, self.space = trained, space
        self.network = trained.network
        self.table = self.costs = trained.table
        self.ladder = trained.ladder
        """Its answers as of the last measurement."""

    @property
    def lowest(self) -> float:
        """The lowest budget that it can meet: what the smallest sub-network costs."""
        return self.table.smallest_ratio

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """What is trained, with how many times the learning rate each group needs: all alike."""
        return [(list(self.network.parameters()), 1.0)]

    def draw(
        self, budget: float, sequences: int, generator: torch.Generator, temperature: float, place: tuple[int, int]
    ) -> Drawn:
        """Random hard choices for a budget, the same for all tokens, on every process."""
        budgets = torch.tensor([budget], device=self.network.smallest.device)
        routed = route(self.network, budgets, generator, temperature)
        return Drawn(routed, for_all_tokens(routed.probabilities[0]), routed.sub_networks[0])

    def answered(self, budget: float) -> Drawn:
        """What the ladder answers to a budget, instead of a draw."""
        budgets = torch.tensor([budget], device=self.network.smallest.device)
        sub_network = self.ladder.at(max(budget * self.table.full, self.ladder.rungs[0].cost)).sub_network
        routed = Routed(budgets, self.network(budgets), self.space.one_hot(sub_network)[None].to(budgets.device))
        return Drawn(routed, for_all_tokens(routed.probabilities[0]), sub_network)

    def answers(self, budgets: Sequence[float], model: PreTrainedModel) -> Mapping[str, SubNetwork]:
        """What budgets get, by name: look-ups in the ladder."""
        return ladder_answers(self.ladder, self.table, budgets)

    def remeasure(self, stage: MeasuringStage, settings: Remeasuring) -> None:
        """Measure some of the router's answers, of the checkpoint's rungs, of the excess losses'; keep the best."""
        series = candidates(on_processor(self.network), self.space, self.table, self.trained.ladder, stage.excess)
        chosen = worth_measuring(series, settings.candidates)
        stage.measure_on(stage.text_to_measure_on(settings.tokens, settings.block_size), settings.batch_size)
        losses = stage.losses_of(chosen, f"measuring losses of {len(chosen)} sub-networks for the ladder")
        self.ladder = measured_ladder(self.table, series, dict(zip(chosen, losses, strict=True)))

    def files(self, settings: dict[str, Any]) -> dict[str, bytes]:
        """Weights and ladder."""
        return replace(self.trained, ladder=self.ladder, settings=settings).files()

    def state(self) -> Any:
        """The ladder."""
        return {"measured": self.ladder.measured, "rungs": self.ladder.to_json()}

    def restore(self, state: Any) -> None:
        """Inverse of `state`."""
        self.ladder = Ladder.from_json(state["rungs"], measured=state["measured"])


class TunedDynamicRouter:
    """A dynamic router that is tuned together with the backbone; its answers are the prices of budgets.

    Args:
        trained: as the checkpoint holds it.
        costs: of sub-networks that are the same for all tokens.
    """

    kind: RouterKind = "dynamic"
    prefix = DYNAMIC
    """How the names of its losses and answers begin."""
    ladder = None

    def __init__(self, trained: TrainedDynamicRouter, costs: CostTable) -> None:
        self.trained, self.table, self.costs = trained, trained.table, costs
        self.network = trained.network
        self.prices = trained.prices
        """As of the last measurement."""

    @property
    def lowest(self) -> float:
        """The lowest budget that it can meet: that has a price."""
        return self.prices.rows[0].budget

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        """What is trained, with how many times the learning rate each group needs: as in the router's own stage."""
        times = float(self.trained.settings.get(BIAS_LEARNING_RATE, 1.0))
        return [([self.network.weight], 1.0), ([self.network.bias], times)]

    def draw(
        self, budget: float, sequences: int, generator: torch.Generator, temperature: float, place: tuple[int, int]
    ) -> Drawn:
        """Random hard choices for a budget, for every token of this process's sequences; see `Stage.place`."""
        routed = RoutedPass(self.network, torch.full((sequences,), budget), generator, temperature, *place)
        return Drawn(routed, routed.probabilities, routed)

    def answers(self, budgets: Sequence[float], model: PreTrainedModel) -> Mapping[str, DynamicPolicy]:
        """What chooses for budgets where a model runs, by name: policies by the prices."""
        now = replace(self.trained, network=on_processor(self.network), prices=self.prices)
        return dynamic_answers(now, budgets, model)

    def remeasure(self, stage: MeasuringStage, settings: Remeasuring) -> None:
        """Find the prices of the same budgets again, from what they were."""
        text = stage.text_to_measure_on(settings.tokens, settings.block_size)
        batches = batches_of(text, settings.batch_size)
        budgets: dict[float, float | None] = {row.budget: row.price for row in self.prices.rows}
        self.prices = stage.find_prices(on_processor(self.network), self.table, budgets, batches)

    def files(self, settings: dict[str, Any]) -> dict[str, bytes]:
        """Weights and prices."""
        kept = {name: self.trained.settings[name] for name in (BIAS_LEARNING_RATE,) if name in self.trained.settings}
        return replace(self.trained, prices=self.prices, settings=settings | kept).files()

    def state(self) -> Any:
        """The prices."""
        return self.prices.to_json()

    def restore(self, state: Any) -> None:
        """Inverse of `state`."""
        self.prices = Prices.from_json(state)


TunedRouter = TunedStaticRouter | TunedDynamicRouter
"""What joint tuning has to know of a kind of router: how it runs in a step, what it answers, how it is kept."""


def tuned_routers(which: Tuned, cost: str | None, folder: Path, space: ElasticSpace) -> list[TunedRouter]:
    """The routers of a Flextron checkpoint that are for a cost.

    Args:
        which: `static`, `dynamic`, or `both`, in this order.
        cost: name of the cost, with the first digits of its cost table's hash where there are several for it; None
            means the only one.
        folder: the checkpoint.
        space: the choices.

    Raises:
        ValueError: if there is none of a kind, or there are several; the message names those that there are. For
            `both`, if they are for different costs.
    """
    found: list[TunedRouter] = []
    static = TrainedRouter.read_all(folder, space)
    if which != "dynamic":
        found.append(TunedStaticRouter(_chosen("static", static, cost, folder, space), space))
    if which != "static":
        router = _chosen("dynamic", TrainedDynamicRouter.read_all(folder, space), cost, folder, space)
        others = (other.table for other in in_force(static, folder, space))
        costs = next((table for table in others if table.name == router.table.name), router.table)
        found.append(TunedDynamicRouter(router, costs))
    names = [tuned.table.name for tuned in found]
    if len({*names}) > 1:
        raise ValueError(
            f"the static router of {folder} is for {names[0]}, the dynamic one for {names[1]}: both are tuned for one "
            "cost; set router to one of them"
        )
    return found


Router = TypeVar("Router", TrainedRouter, TrainedDynamicRouter)


def _chosen(kind: RouterKind, routers: Sequence[Router], cost: str | None, folder: Path, space: ElasticSpace) -> Router:
    named = {router.name.removeprefix(f"{kind}-"): router for router in routers}
    found = {name: router for name, router in named.items() if cost in (None, name, router.table.name)}
    if not found:
        there = f"it has those for {', '.join(named)}" if named else "it has none"
        wanted = "" if cost is None else f" for {cost}"
        raise ValueError(
            f"{folder} holds no {kind} router{wanted}, {there}: run the {kind} router stage first "
            f"(configs/stages/{kind}_router.yaml), or set cost to one of them"
        )
    meant = in_force(list(found.values()), folder, space)
    if len(meant) > 1:
        raise ValueError(f"{folder} holds several {kind} routers; set cost to one of {', '.join(found)}")
    return meant[0]
