"""A sub-network cut out of its elastic network, with what every format has to know of it."""

import copy
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.extraction import keep_layers_of, kept_layers, stock_fields
from flextron_lit.space import BlockKind, SubNetwork


@dataclass(frozen=True)
class SmallModel:
    """A sub-network as a model with small weights; no class on disk may be able to hold it."""

    model: PreTrainedModel
    """Stock modules with smaller weights, and modules that add nothing where a block is skipped."""
    dense: PreTrainedConfig
    """Config of the full network, without the layers that the small one lacks."""
    groups: tuple[int, ...]
    """KV groups of each layer that is left; 0 where the attention is skipped."""
    neurons: tuple[int, ...]
    """Neurons of each layer that is left; 0 where the MLP is skipped."""
    heads_per_group: int
    """Query heads of a KV group."""
    head_dim: int
    """Rows of a head."""
    paths: dict[BlockKind, str]
    """Attribute of a layer that holds its attention, and its MLP."""
    full_parameters: int
    """Weights of the full network, tied ones counted once."""
    in_stock_class: bool
    """Whether the class of the full network holds it."""

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
        return self.model.num_parameters()


def cut_out(backbone: ElasticBackbone, sub_network: SubNetwork) -> SmallModel:
    """Extract a sub-network and note its widths.

    Raises:
        ValueError: if it belongs to another space.
    """
    widths = backbone.space.widths(sub_network)
    kept, dense = kept_layers(backbone, widths), copy.deepcopy(backbone.model.config)
    keep_layers_of(dense, kept)
    attention = backbone.blocks[0]
    return SmallModel(
        model=extract(backbone, sub_network),
        dense=dense,
        # blocks alternate
        groups=tuple(widths[2 * layer] for layer in kept),
        neurons=tuple(widths[2 * layer + 1] for layer in kept),
        heads_per_group=attention.heads_per_unit,
        head_dim=attention.head_dim,
        paths={kind: each.path for kind, each in backbone.family.blocks.items()},
        full_parameters=sum(each.numel() for each in backbone.parameters.values()),
        in_stock_class=stock_fields(backbone, widths) is not None,
    )
