"""Matrix products with the first units of a weight: views, never masks or gathered copies (method: 0.50x at half).

Bands are the parts of those first units that the tokens of a pass use in different numbers (`TokenGroups`).
"""

from dataclasses import replace

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.adapters import PLAIN, active, add, bias_of, plain
from flextron_lit.elastic.grouping import Part, TokenGroups


def weight_of(linear: nn.Module) -> Tensor:
    """The weight of a linear layer, or of that below its adapters, or a view of it, as [out, in]."""
    own = plain(linear)
    return own.weight.t() if isinstance(own, Conv1D) else own.weight


def first_rows(linear: nn.Module, inputs: Tensor, rows: int, start: int = 0) -> Tensor:
    """So many output features of a linear layer, from `start` on: [..., in] to [..., rows]."""
    # a slice of the stored rows is what the matrix product reads in place: a mask would compute all of them, and an
    # index would copy them first
    wanted = slice(start, start + rows)
    bias = bias_of(linear)
    outputs = F.linear(inputs, weight_of(linear)[wanted], None if bias is None else bias[wanted])
    return outputs if type(linear) in PLAIN else add(outputs, inputs, active(linear), wanted)


def band_rows(linear: nn.Module, groups: TokenGroups, rows: int = 1) -> Part:
    """The output features of every band, each from the whole input; a unit has so many rows."""
    weights, biases = split_rows(groups, weight_of(linear), bias_of(linear), rows)
    adapters = [(each, groups.split(each.up, 0, rows)) for each in active(linear)]

    def part(own: Tensor, band: int) -> Tensor:
        outputs = F.linear(own, weights[band], biases[band])
        for adapter, ups in adapters:
            outputs = add(outputs, own, (replace(adapter, up=ups[band]),))
        return outputs

    return part


def band_columns(linear: nn.Module, groups: TokenGroups, rows: int = 1) -> Part:
    """What every band of the input adds to the whole output, without the bias; a unit has so many rows."""
    weights = groups.split(weight_of(linear), 1, rows)
    adapters = [(each, groups.split(each.down, 1, rows)) for each in active(linear)]

    def part(own: Tensor, band: int) -> Tensor:
        outputs = F.linear(own, weights[band])
        for adapter, downs in adapters:
            outputs = add(outputs, own, (replace(adapter, down=downs[band]),))
        return outputs

    return part


def split_rows(
    groups: TokenGroups, weight: Tensor, bias: Tensor | None, rows: int = 1
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Weight and bias of the output features of every band, for `F.linear`; a unit has so many rows."""
    weights = groups.split(weight, 0, rows)
    return weights, len(weights) * (None,) if bias is None else groups.split(bias, 0, rows)


def spread_rows(linear: nn.Module, inputs: Tensor, groups: TokenGroups, rows: int) -> Tensor:
    """Output features of a linear layer, of every token those of its own units; see `TokenGroups.spread`."""
    return groups.spread(inputs, band_rows(linear, groups, rows))
