"""Matrix products with the first units of a weight: views, never masks or gathered copies (method: 0.50x at half).

Bands are the parts of those first units that the tokens of a pass use in different numbers (`TokenGroups`).
"""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.grouping import TokenGroups

Linear = nn.Linear | Conv1D
"""Both kinds of linear layer: GPT-2's holds its weight transposed, and always has a bias."""


def weight_of(linear: Linear) -> Tensor:
    """The weight, or a view of it, as [out, in]."""
    return linear.weight.t() if isinstance(linear, Conv1D) else linear.weight


def first_rows(linear: Linear, inputs: Tensor, rows: int, start: int = 0) -> Tensor:
    """So many output features of a linear layer, from `start` on: [..., in] to [..., rows]."""
    # a slice of the stored rows is what the matrix product reads in place: a mask would compute all of them, and an
    # index would copy them first
    wanted = slice(start, start + rows)
    bias = None if linear.bias is None else linear.bias[wanted]
    return F.linear(inputs, weight_of(linear)[wanted], bias)


def bands(linear: Linear, groups: TokenGroups, rows: int = 1) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the output features of every band, for `F.linear`; a unit has so many rows."""
    weights = groups.split(weight_of(linear), 0, rows)
    biases = len(weights) * (None,) if linear.bias is None else groups.split(linear.bias, 0, rows)
    return list(zip(weights, biases, strict=True))


def spread_rows(linear: Linear, inputs: Tensor, groups: TokenGroups, rows: int) -> Tensor:
    """Output features of a linear layer, of every token those of its own units; see `TokenGroups.spread`."""
    parts = bands(linear, groups, rows)
    return groups.spread(inputs, lambda own, band: F.linear(own, *parts[band]))
