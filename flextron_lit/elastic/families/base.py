"""The shape of a family file: what differs between Hugging Face model families, and nothing else knows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.selection import ActiveSelection
from flextron_lit.space import BlockKind


@dataclass(frozen=True)
class BlockHandle:
    """All that an elastic module holds: which block it is, and whom to ask."""

    index: int
    full: int
    selection: ActiveSelection

    def width(self, hidden_states: Tensor) -> int | TokenGroups:
        """Units that this block uses for this input, [B, T, D]: one number, or a width for every token.

        Tokens that all choose alike have one number, but in attention narrower than full: there it would mean that
        keys and values are narrow too.
        """
        width = self.selection.width(self.index, hidden_states)
        if isinstance(width, TokenGroups) and width.order is None:
            mlp = self.selection.space.blocks[self.index].kind == "mlp"
            return width.units if mlp or width.units == self.full else width
        return width


@dataclass(frozen=True)
class BlockLayout:
    """One of a family's two kinds of elastic block."""

    path: str
    """Attribute path of the module within a decoder layer."""
    stock: type[nn.Module]
    """The Hugging Face class it must have."""
    elastic: type[nn.Module]
    """The subclass that replaces it in place."""
    full_width: Callable[[PreTrainedConfig], int]
    """Number of its units, from the config."""
    axes: tuple[Axis, ...]
    """Every tensor that carries units."""
    shared: frozenset[str]
    """Parameters that do not: used whole at every width."""
    projections: dict[str, type[nn.Module]]
    """Sub-modules whose weights are sliced, with the exact class that the slicing knows."""
    output: str
    """Sub-module that reads the units' activations, [B, T, units x rows of a unit]."""
    narrow: Callable[[Any, int], None] | None = None
    """Tells a stock module that its weights hold so many units, where its attributes say how many."""


@dataclass(frozen=True)
class Family:
    """A Hugging Face model family."""

    model: type[PreTrainedModel]
    """The causal LM class."""
    layers: str
    """Attribute path of the decoder layers."""
    blocks: dict[BlockKind, BlockLayout]
    """Layout of its attention and of its MLP."""
    uniform_config: Callable[[PreTrainedConfig, int, int], dict[str, Any] | None]
    """Config fields of a stock model with so many KV groups and neurons in every layer; None if none can hold it."""
