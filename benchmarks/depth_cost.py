"""FLOPs of a request whose tokens skip layers, counted as `flextron_lit.costs` counts those of sub-networks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from flextron_lit.costs import COUNTED, CostTable, Workload
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.sources.stock import from_config
from flextron_lit.space import SpaceConfig

WHOLE_OR_NONE = SpaceConfig(mlp=[0, 1.0], attention=[0, 1.0])
"""Every block may be skipped but the first layer's attention."""


@dataclass(frozen=True)
class Request:
    """A request taken apart as ways that skip layers leave parts of it out."""

    table: CostTable
    """FLOPs of the request in the space of `WHOLE_OR_NONE`."""
    kv: float
    """Those of keys and values in one layer, all tokens."""
    head: float
    """Those of the head for one token."""
    workload: Workload

    @classmethod
    def of(cls, config: PreTrainedConfig, workload: Workload) -> Request:
        """Of a Llama's."""
        with torch.device("meta"):
            backbone = ElasticBackbone(from_config(config), WHOLE_OR_NONE)
        attention = backbone.layers[0].self_attn
        projections = attention.k_proj.weight.numel() + attention.v_proj.weight.numel()
        return cls(
            COUNTED["flops"](backbone, workload),
            2.0 * workload.total_tokens * projections,
            2.0 * backbone.model.get_output_embeddings().weight.numel(),
            workload,
        )

    @property
    def layers(self) -> Tensor:
        """FLOPs of every layer, all tokens: [L]."""
        return self.table.padded.amax(1).view(-1, 2).sum(1)

    def share(self, ran: Tensor, filled: Tensor, beside: float = 0.0) -> float:
        """A request's, as a share of the full network's.

        Args:
            ran: share of the tokens that run each layer, [L].
            filled: share of those that skip it but leave their keys and values, [L].
            beside: FLOPs of a token beside the layers: of what chooses, for one.
        """
        layers = float((ran.double() * self.layers + filled.double() * self.kv).sum())
        return (self.table.fixed + layers + beside * self.workload.total_tokens) / self.table.full

    def of_layers(self, count: int) -> float:
        """The share of a network of so many of the layers."""
        ran = torch.zeros(len(self.layers))
        ran[:count] = 1
        return self.share(ran, torch.zeros_like(ran))

    def nearest(self, target: float) -> int:
        """How many layers come nearest to a share."""
        return min(range(1, len(self.layers) + 1), key=lambda count: abs(self.of_layers(count) - target))


def products(module: nn.Module) -> float:
    """FLOPs of a module's matrices for one token."""
    return sum(2.0 * each.numel() for each in module.parameters() if each.dim() == 2)
