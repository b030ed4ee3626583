"""What the elastic MLPs of all families have in common, and those of `nn.Linear` layers in full."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flextron_lit.elastic.families.base import BlockHandle
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import linear_bands, linear_columns, linear_rows


class ElasticMLP(nn.Module):
    """MLP that uses its first neurons only (paper, elastic MLP).

    A family's class has this one and the stock class as its bases, in that order: at full width the stock forward runs.
    """

    elastic: BlockHandle

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        width = self.elastic.width(hidden_states)
        if width == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states)
        if isinstance(width, TokenGroups):
            return self._grouped(hidden_states, width) if width.bands else torch.zeros_like(hidden_states)
        return self._prefix(hidden_states, width) if width else torch.zeros_like(hidden_states)

    def _prefix(self, hidden_states: Tensor, width: int) -> Tensor:
        """All tokens with the same width, neither 0 nor the full one."""
        raise NotImplementedError

    def _grouped(self, hidden_states: Tensor, groups: TokenGroups) -> Tensor:
        """Every token with its own width, of which one at least is not 0."""
        raise NotImplementedError


class LinearMLP(ElasticMLP):
    """Of `nn.Linear` layers: those named in `inner` give what `_activate` turns into neurons, `outer` reads them."""

    inner: ClassVar[tuple[str, ...]]
    outer: ClassVar[str]

    def _activate(self, *projected: Tensor) -> Tensor:
        """What the inner layers give, [..., F] each, to the neurons, [..., F]."""
        raise NotImplementedError

    def _layers(self) -> tuple[list[nn.Linear], nn.Linear]:
        return [getattr(self, name) for name in self.inner], getattr(self, self.outer)

    def _prefix(self, hidden_states: Tensor, width: int) -> Tensor:
        inner, outer = self._layers()
        return linear_columns(outer, self._activate(*(linear_rows(linear, hidden_states, width) for linear in inner)))

    def _grouped(self, hidden_states: Tensor, groups: TokenGroups) -> Tensor:
        inner, outer = self._layers()
        firsts = [linear_bands(linear, groups) for linear in inner]
        lasts = groups.split(outer.weight, 1)

        def part(rows: Tensor, band: int) -> Tensor:
            return F.linear(self._activate(*(F.linear(rows, *bands[band]) for bands in firsts)), lasts[band])

        return groups.add_up(hidden_states, part, outer.bias)


class GatedMLP(LinearMLP):
    """Llama's and that of many families after it: one layer's activations times the other's outputs."""

    act_fn: Callable[[Tensor], Tensor]
    inner = ("gate_proj", "up_proj")
    outer = "down_proj"

    def _activate(self, *projected: Tensor) -> Tensor:
        gates, ups = projected
        return self.act_fn(gates) * ups
