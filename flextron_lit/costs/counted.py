"""Costs that follow from the shapes alone."""

from __future__ import annotations

from flextron_lit.costs.table import CostTable
from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock


def parameter_table(backbone: ElasticBackbone) -> CostTable:
    """Parameters per block and choice (ours: the paper's table of latencies in another unit).

    Tied weights count once. A skipped block counts nothing, not even the biases that every width shares.
    """
    blocks = tuple(tuple(_parameters(e, width) for width in e.block.widths) for e in backbone.blocks)
    total = sum(parameter.numel() for parameter in backbone.model.parameters())
    return CostTable("parameters", "parameters", total - sum(row[-1] for row in blocks), blocks)


def _parameters(elastic: ElasticBlock, width: int) -> float:
    if width == 0:
        return 0.0
    carried = {axis.tensor: axis.prefix_numel(tensor, width, elastic.block.full) for axis, tensor in elastic.tensors}
    shared = sum(p.numel() for name, p in elastic.module.named_parameters() if name not in carried)
    return float(sum(carried.values()) + shared)
