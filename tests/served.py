"""A Flextron checkpoint with routers, made in a moment: nothing is trained, all weights are random."""

from dataclasses import replace

import torch

from flextron_lit import checkpoint
from flextron_lit.costs import COUNTED, Workload
from flextron_lit.costs.dynamic import DYNAMIC_COUNTED
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.latency.latency_table import LatencyTable, PhaseLatency, conditions
from flextron_lit.routers.budget_prices import Priced, Prices
from flextron_lit.routers.dynamic import DynamicRouter
from flextron_lit.routers.ladder import Ladder, Rung
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter
from flextron_lit.sources import load_dense, load_tokenizer
from flextron_lit.space import SpaceConfig
from tests.conftest import randomised
from tests.front_door import ROOT
from tests.options import seed

TINY = f"random:{ROOT / 'configs/models/tiny-llama'}"
SPACE = SpaceConfig(mlp=[0, 32, 64, 128], attention=[0, 1, 2, 4])


def static_router(backbone):
    """Its answers go from the smallest network to the full one, all layers alike."""
    space, table = backbone.space, COUNTED["parameters"](backbone, Workload())
    answers = [space.smallest(), space.uniform(mlp=0.25, attention=0.5), space.uniform(mlp=0.5), space.full()]
    rungs = [Rung(table.cost(sub), loss, sub) for loss, sub in zip((4.0, 3.0, 2.5, 2.0), answers, strict=True)]
    return TrainedRouter(StaticRouter(space, 4, torch.Generator().manual_seed(seed(0))), table, Ladder(tuple(rungs)))


def latency_router(backbone, prompt_tokens=16):
    """A static router for the latency of `latency_table`, with four answers."""
    space, table = backbone.space, latency_table(backbone, prompt_tokens).tables()["latency"]
    answers = [space.smallest(), space.uniform(mlp=0.5), space.uniform(mlp=0.5, attention=0.5), space.full()]
    costs = sorted((table.cost(sub), sub) for sub in answers)
    ladder = Ladder(tuple(Rung(cost, 4.0 - place, sub) for place, (cost, sub) in enumerate(costs)))
    return replace(static_router(backbone), table=table, ladder=ladder)


def dynamic_router(backbone):
    """Tokens take widths of their own, and less at a smaller budget."""
    table = DYNAMIC_COUNTED["flops"](backbone, Workload())
    router = DynamicRouter(backbone.space, backbone.model.config.hidden_size, torch.tensor([0.5, 1.0]))
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(seed(4)))
    prices = Prices((Priced(0.75, 3.0, 0.75, 3.0), Priced(0.95, -3.0, 0.95, 2.0)))
    return TrainedDynamicRouter(router, table, prices)


def latency_table(backbone, prompt_tokens):
    """As if a millisecond were a floating-point operation."""
    workload = Workload(prompt_tokens=prompt_tokens)
    tables = {phase: COUNTED[f"{phase}_flops"](backbone, workload) for phase in workload.phases}
    phases = {p: PhaseLatency(replace(t, name=p, unit="ms"), 0.0, ()) for p, t in tables.items()}
    return LatencyTable(conditions(backbone, workload), phases)


def write(folder, *, history=(), chat_template=None, routers=(static_router, dynamic_router)):
    """The folder, with a tiny Llama and the routers."""
    backbone = ElasticBackbone(randomised(load_dense(TINY)), SPACE)
    tokenizer = load_tokenizer(TINY)
    tokenizer.chat_template = chat_template
    order = [torch.arange(block.full).flip(0) for block in backbone.space.blocks]
    files = {name: content for made in routers for name, content in made(backbone).files().items()}
    checkpoint.write(folder, backbone, tokenizer, order=order, history=list(history), files=files)
    return folder
