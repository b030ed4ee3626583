"""A sub-network cut out of its elastic network, with what every format has to know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.space import BlockKind, SubNetwork


@dataclass(frozen=True)
class SmallModel:
    """A sub-network as a model with small weights; no class on disk may be able to hold it."""

    model: PreTrainedModel
    """Stock modules with smaller weights, and modules that add nothing where a block is skipped."""
    dense: PreTrainedConfig
    """Config of the full network."""
    groups: tuple[int, ...]
    """KV groups per layer; 0 where the attention is skipped."""
    neurons: tuple[int, ...]
    """Neurons per layer; 0 where the MLP is skipped."""
    heads_per_group: int
    """Query heads of a KV group."""
    head_dim: int
    """Rows of a head."""
    paths: dict[BlockKind, str]
    """Attribute of a layer that holds its attention, and its MLP."""
    stock_fields: dict[str, Any] | None
    """Config fields by which the class of the full network holds it; None if it cannot."""

    @property
    def family(self) -> str:
        """The `model_type` of the full network."""
        return str(self.dense.model_type)

    @property
    def skips(self) -> bool:
        """Whether any block is left out."""
        return 0 in self.groups or 0 in self.neurons

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike and none leaves anything out."""
        return len(set(self.groups)) == len(set(self.neurons)) == 1 and not self.skips

    @property
    def parameters(self) -> int:
        """Weights, tied ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def cut_out(backbone: ElasticBackbone, sub_network: SubNetwork) -> SmallModel:
    """Extract a sub-network and note its widths.

    Raises:
        ValueError: if it belongs to another space.
    """
    model = extract(backbone, sub_network)
    chosen = list(zip(backbone.space.blocks, backbone.space.widths(sub_network), strict=True))
    widths = {kind: tuple(w for block, w in chosen if block.kind == kind) for kind in backbone.family.blocks}
    attention = next(elastic for elastic in backbone.blocks if elastic.block.kind == "attention")
    small = SmallModel(
        model=model,
        dense=backbone.model.config,
        groups=widths["attention"],
        neurons=widths["mlp"],
        heads_per_group=attention.heads_per_unit,
        head_dim=attention.head_dim,
        paths={kind: each.path for kind, each in backbone.family.blocks.items()},
        stock_fields=None,
    )
    if not small.uniform:
        return small
    fields = backbone.family.uniform_config(small.dense, small.groups[0], small.neurons[0])
    return replace(small, stock_fields=fields)
