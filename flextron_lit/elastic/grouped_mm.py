"""All bands of an MLP in one launch a matrix, on a GPU that has a kernel for it: grouped matrix products (ours).

Bands of equal size are what experts are to that kernel. It takes views of the weights; only the tokens' rows are
copied, once for every band that uses them. Elsewhere torch loops over the experts itself, which gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron_lit.elastic.grouping import TokenGroups

MOST_EXPERTS = 8
"""More would be bands so narrow that the copies of the rows outweigh the launches."""
CAPABILITY = (9, 0)
"""CUDA devices below have no kernel (torch 2.13)."""
ALIGNMENT = 8
"""Units and features are in multiples of so many: 16 bytes of bf16, which the kernel loads at once."""


def fits(groups: TokenGroups, inputs: Tensor) -> bool:
    """Whether one launch can compute these groups for inputs [B, T, D], and a kernel for it exists."""
    if len(groups.bands) < 2 or not _has_kernel(inputs):
        return False
    size = _expert_size(groups)
    return groups.units // size <= MOST_EXPERTS and size % ALIGNMENT == inputs.shape[-1] % ALIGNMENT == 0


def grouped_mlp(
    groups: TokenGroups,
    inputs: Tensor,
    inner: Sequence[tuple[Tensor, Tensor | None]],
    activate: Callable[..., Tensor],
    outer: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """An MLP whose tokens have their own widths.

    Args:
        groups: of several bands.
        inputs: [B, T, D].
        inner: weight [D, F] and bias [F] of every projection to the units.
        activate: their outputs to the units' activations.
        outer: weight [F, D].
        bias: [D], for every token that uses any unit.

    Returns:
        [B, T, D]; zeros for tokens that use no unit.
    """
    dtype, size = _dtype(inputs), _expert_size(groups)
    experts = groups.units // size
    rows = [band.rows for band in groups.bands for _ in range((band.stop - band.start) // size)]
    own = groups.gather(inputs).to(dtype)
    copies = torch.cat([own[:count] for count in rows])
    ends = torch.tensor(list(accumulate(rows)), dtype=torch.int32, device=inputs.device)

    def units_of(weight: Tensor, bias: Tensor | None) -> Tensor:
        product = F.grouped_mm(copies, _experts(weight, 1, experts, size).movedim(1, 0).to(dtype), offs=ends)
        if bias is None:
            return product
        repeats = torch.tensor(rows, device=inputs.device)
        biases = _experts(bias, 0, experts, size).to(dtype)
        return product + biases.repeat_interleave(repeats, 0, output_size=len(copies))

    # autocast raises what some activations compute to fp32
    units = activate(*(units_of(*projection) for projection in inner)).to(dtype)
    first, *others = F.grouped_mm(units, _experts(outer, 0, experts, size).to(dtype), offs=ends).split(rows)
    total = first.clone() if bias is None else first + bias
    for part in others:
        total[: len(part)] += part
    return groups.scatter(total, inputs)


def _has_kernel(inputs: Tensor) -> bool:
    if inputs.device.type != "cuda" or _dtype(inputs) != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(inputs.device) >= CAPABILITY


def _dtype(inputs: Tensor) -> torch.dtype:
    device = inputs.device.type
    # autocast does not know this product
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


def _expert_size(groups: TokenGroups) -> int:
    return gcd(*(band.stop - band.start for band in groups.bands))


def _experts(weight: Tensor, dim: int, experts: int, size: int) -> Tensor:
    return weight.narrow(dim, 0, experts * size).unflatten(dim, (experts, size))
