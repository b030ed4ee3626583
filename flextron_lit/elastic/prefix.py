"""Matrix products with the first units of a weight: views, never masks or gathered copies (method: 0.50x at half).

Bands are the parts of those first units that the tokens of a pass use in different numbers (`TokenGroups`).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.grouping import TokenGroups


def linear_rows(linear: nn.Linear, inputs: Tensor, rows: int) -> Tensor:
    """The first `rows` output features of a linear layer: [..., in] to [..., rows]."""
    bias = None if linear.bias is None else linear.bias[:rows]
    return F.linear(inputs, linear.weight[:rows], bias)


def linear_columns(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """A linear layer fed with only its first input features: [..., columns] to [..., out]."""
    return F.linear(inputs, linear.weight[:, : inputs.shape[-1]], linear.bias)


def conv1d_columns(conv1d: Conv1D, inputs: Tensor, start: int, columns: int) -> Tensor:
    """Output features `start` and on of GPT-2's transposed linear layer: [..., in] to [..., columns]."""
    stop = start + columns
    return F.linear(inputs, conv1d.weight[:, start:stop].t(), conv1d.bias[start:stop])


def conv1d_rows(conv1d: Conv1D, inputs: Tensor) -> Tensor:
    """GPT-2's transposed linear layer fed with only its first input features: [..., rows] to [..., out]."""
    return F.linear(inputs, conv1d.weight[: inputs.shape[-1]].t(), conv1d.bias)


def linear_bands(linear: nn.Linear, groups: TokenGroups, rows: int = 1) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of the output features of every band, for `F.linear`; a unit has so many rows."""
    weights = groups.split(linear.weight, 0, rows)
    biases = len(weights) * (None,) if linear.bias is None else groups.split(linear.bias, 0, rows)
    return list(zip(weights, biases, strict=True))


def conv1d_bands(
    conv1d: Conv1D, groups: TokenGroups, rows: int = 1, features: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """As `linear_bands`, for the first `features` output features of GPT-2's transposed linear layer."""
    weight, bias = conv1d.weight[:, :features].t(), conv1d.bias[:features]
    return list(zip(groups.split(weight, 0, rows), groups.split(bias, 0, rows), strict=True))
