"""Bytes of what stages keep beside networks: cost tables, ladders, pairs, a surrogate and a static router."""

import torch

from flextron_lit.planning.asked import Stage
from flextron_lit.routers.ladder import BUDGETS
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.surrogate import Surrogate
from flextron_lit.space import ElasticSpace
from flextron_lit.stages.static_router import StaticRouterSettings
from flextron_lit.stages.surrogate_training import SurrogateSettings

NUMBER = 8
"""Bytes of a number in a table or of a choice in a ladder."""
LEARNS = 4
"""A weight in float32 with its gradient and two moments."""


def table_bytes(stage: Stage, space: ElasticSpace) -> float:
    """What a stage keeps of them, with what the small modules learn by; routers that run with the network apart."""
    entries = len(space) * space.num_choices
    tables = float(NUMBER * entries)
    if stage != "elastic":
        tables += NUMBER * BUDGETS * len(space)
    if stage not in ("surrogate", "static_router"):
        return tables
    surrogate = SurrogateSettings()
    tables += 4.0 * (surrogate.pairs + surrogate.held_out) * entries
    modules: list[torch.nn.Module] = [Surrogate(space, surrogate.hidden, torch.Generator())]
    if stage == "static_router":
        modules.append(StaticRouter(space, StaticRouterSettings().hidden, torch.Generator()))
    return tables + sum(LEARNS * each.nbytes for module in modules for each in module.parameters())
