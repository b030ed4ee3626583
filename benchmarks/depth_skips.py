"""Static networks of ours that lack layers, or attention and MLP modules, by the excess losses of widths 0."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from depth_cost import WHOLE_OR_NONE, Request
from torch import Tensor
from transformers import PreTrainedModel

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.fisher import output_gradients
from flextron_lit.elastic.reconstruction import reconstruct
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.routers.from_budget import Routing
from flextron_lit.space import SubNetwork


class Skips:
    """A network with widths 0, and what each block's absence loses."""

    lost: list[list[float]]
    """Nats per token, a row a block: its choices, the full one 0."""

    def __init__(self, model: PreTrainedModel, request: Request) -> None:
        self.backbone = ElasticBackbone(copy.deepcopy(model), WHOLE_OR_NONE)
        self.request = request

    def computed(self, blocks: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
        """What conversion computes, of blocks [1, T] of training text."""
        fisher = output_gradients(self.backbone, blocks, torch.Generator().manual_seed(0))
        whole = {name: torch.cat([block[name] for block in blocks]) for name in ("input_ids", "position_ids")}
        as_they_are = [torch.arange(block.full) for block in self.backbone.space.blocks]
        found = reconstruct(self.backbone, whole, as_they_are, "none", fisher)
        return [each.excess for each in found if each.excess is not None]

    def layers(self, target: float) -> SubNetwork:
        """Whole layers go, the cheapest first; the first one stays, since its attention does."""
        count = len(self.lost) // 2
        lost = {layer: self.lost[2 * layer][0] + self.lost[2 * layer + 1][0] for layer in range(1, count)}
        gone = sorted(lost, key=lost.__getitem__)[: count - self.request.nearest(target)]
        full = self.backbone.space.full()
        return SubNetwork(tuple(0 if block // 2 in gone else c for block, c in enumerate(full.choices)))

    def blocks(self, target: float) -> SubNetwork:
        """Attention and MLP modules by themselves, as a budget is answered before there is a surrogate."""
        table, excess = self.request.table, ExcessTable(tuple(map(tuple, self.lost)), 0)
        routing = Routing(self.backbone.space, {table.name: table}, {}, None, excess)
        answer = routing.answer(routing.parse(f"{table.name}={target}"))
        assert answer is not None
        return answer.sub_network
