"""Matrix products with the first units of a weight: views, never masks or gathered copies (method: 0.50x at half)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def linear_rows(linear: nn.Linear, inputs: Tensor, rows: int) -> Tensor:
    """The first `rows` output features of a linear layer: [..., in] to [..., rows]."""
    bias = None if linear.bias is None else linear.bias[:rows]
    return F.linear(inputs, linear.weight[:rows], bias)


def linear_columns(linear: nn.Linear, inputs: Tensor) -> Tensor:
    """A linear layer fed with only its first input features: [..., columns] to [..., out]."""
    return F.linear(inputs, linear.weight[:, : inputs.shape[-1]], linear.bias)
