"""Matrix products with the first units of a weight: views, never masks or gathered copies (method: 0.50x at half)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


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
