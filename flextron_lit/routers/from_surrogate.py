"""A router from a surrogate alone: seconds, and no LLM (ours; the stage does the same while it measures new pairs)."""

import torch

from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.costs.table import CostTable
from flextron_lit.routers.ladder import build_ladder
from flextron_lit.routers.noise import Temperature
from flextron_lit.routers.objective import CostPenalty, route
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.trained import TrainedRouter, TrainedSurrogate
from flextron_lit.space import ElasticSpace
from flextron_lit.terminal.progress import progress

BUDGETS_A_STEP = 64
LEARNING_RATE = 3e-3
HIDDEN = 128


def train_router(
    space: ElasticSpace, table: CostTable, surrogate: TrainedSurrogate, *, steps: int, seed: int
) -> TrainedRouter:
    """Train a static router through a frozen surrogate, and build its ladder.

    Args:
        space: the choices.
        table: the cost that budgets are ratios of.
        surrogate: what predicts losses; it does not change.
        steps: updates.
        seed: of first weights, noise and budgets.

    Raises:
        ValueError: if all sub-networks cost the same.
    """
    generator = torch.Generator().manual_seed(seed)
    router = StaticRouter(space, HIDDEN, generator)
    temperature, penalty = Temperature(), CostPenalty()
    router.scale_to(table)
    network = surrogate.network.requires_grad_(False)
    optimizer = torch.optim.Adam(router.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    for step in progress(range(steps), f"training a router for {table.name} from the surrogate"):
        budgets = torch.tensor(sampling.budgets(table.smallest_ratio, BUDGETS_A_STEP, generator))
        routed = route(router, budgets, generator, temperature.at(step / steps))
        predicted = (network(routed.probabilities) - network.centre) / network.scale
        loss = predicted.mean() + penalty.of(routed.ratios(table), routed.budgets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    ladder = build_ladder(router, space, table, network, to_nats=surrogate.to_nats, full_loss=surrogate.full_loss)
    settings = {"steps": steps, "seed": seed, "from": "the kept surrogate"}
    return TrainedRouter(router, table, ladder, settings=settings)
