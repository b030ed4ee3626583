"""What the elastic MLPs of all families have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flextron_lit.elastic.adapters import bias_of
from flextron_lit.elastic.families.base import ElasticModule
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import band_columns, band_rows, first_rows


class ElasticMLP(ElasticModule):
    """MLP that uses its first neurons only (paper, elastic MLP); at full width the stock forward runs."""

    path = "mlp"
    norm = "post_attention_layernorm"

    @staticmethod
    def full_width(config: PreTrainedConfig) -> int:
        """Its neurons."""
        return int(config.intermediate_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        width = self.elastic.width(hidden_states)
        if width == self.elastic.full:
            stock: Any = super()
            return stock.forward(hidden_states)
        self.refuse_foreign()
        if isinstance(width, TokenGroups):
            return self._grouped(hidden_states, width) if width.bands else torch.zeros_like(hidden_states)
        return self._prefix(hidden_states, width) if width else torch.zeros_like(hidden_states)

    def _activate(self, *projected: Tensor) -> Tensor:
        """What the inner layers give, [..., F] each, to the neurons, [..., F]."""
        raise NotImplementedError

    def _prefix(self, hidden_states: Tensor, width: int) -> Tensor:
        """All tokens with the same width, neither 0 nor the full one."""
        projected = (first_rows(getattr(self, name), hidden_states, width) for name in self.inner)
        return self.read(self._activate(*projected), width)

    def _grouped(self, hidden_states: Tensor, groups: TokenGroups) -> Tensor:
        """Every token with its own width, of which one at least is not 0."""
        outer = getattr(self, self.outer)
        firsts = [band_rows(getattr(self, name), groups) for name in self.inner]

        def activations(rows: Tensor, band: int) -> Tensor:
            return self._activate(*(first(rows, band) for first in firsts))

        if self.compensation.empty:
            last = band_columns(outer, groups)
            return groups.add_up(hidden_states, lambda own, i: last(activations(own, i), i), bias_of(outer))
        return groups.each_width(hidden_states, activations, self.read)


class GatedMLP(ElasticMLP):
    """Llama's and that of many families after it: one layer's activations times the other's outputs."""

    act_fn: Callable[[Tensor], Tensor]
    inner = ("gate_proj", "up_proj")
    outer = "down_proj"

    def _activate(self, *projected: Tensor) -> Tensor:
        gates, ups = projected
        return self.act_fn(gates) * ups


class PlainMLP(ElasticMLP):
    """That of the GPT families, without a gate."""

    act: Callable[[Tensor], Tensor]

    def _activate(self, *projected: Tensor) -> Tensor:
        (hidden,) = projected
        return self.act(hidden)
