"""The search space: which widths every elastic block may take, and one choice among them per block.

Shape legend of the whole project: B batch, T tokens, D hidden_size, F MLP neurons, H query heads, K KV groups,
L layers, N choices, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

BlockKind = Literal["attention", "mlp"]
KINDS: tuple[BlockKind, ...] = get_args(BlockKind)
ROUNDING = 1e-6
"""Units, by which a ratio may miss a whole number of them."""


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """Widths of one layer that differ from those of the others."""

    mlp: list[int | float] | None = None
    """Width choices of this layer's MLP; None keeps the common ones."""
    attention: list[int | float] | None = None
    """Width choices of this layer's attention; None keeps the common ones."""


@dataclass(frozen=True, kw_only=True)
class SpaceConfig:
    """The width choices as a user writes them: an int counts units, a float is a ratio of the full width."""

    mlp: list[int | float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0])
    """MLP widths, ascending, the last one the full width: neurons (int) or ratios (float); 0 skips the block."""
    attention: list[int | float] | None = None
    """Attention widths in KV groups (int) or ratios (float); None means every count from 1 to all; 0 skips the block,
    in every layer but the first, whose attention always runs (the KV cache reads its length there), and the first of
    those with a sliding window, if only some have one."""
    layers: dict[int, LayerWidths] = field(default_factory=dict)
    """Layers whose widths differ, by layer index."""


@dataclass(frozen=True)
class Block:
    """One elastic block: an MLP (unit: neuron) or an attention module (unit: KV group with its query heads)."""

    layer: int
    kind: BlockKind
    widths: tuple[int, ...]

    @property
    def name(self) -> str:
        """Stable name, for logs and files."""
        return f"layers.{self.layer}.{self.kind}"

    @property
    def full(self) -> int:
        """Number of units of the dense model."""
        return self.widths[-1]


@dataclass(frozen=True)
class SubNetwork:
    """One choice index per elastic block. Immutable and hashable; only an `ElasticSpace` gives it a meaning."""

    choices: tuple[int, ...]

    def to_json(self) -> list[int]:
        """The choice indices."""
        return list(self.choices)

    @classmethod
    def from_json(cls, data: Sequence[int]) -> SubNetwork:
        """Inverse of `to_json`."""
        return cls(tuple(int(choice) for choice in data))

    def replace(self, block: int, choice: int) -> SubNetwork:
        """The same sub-network with another choice at one block."""
        return SubNetwork((*self.choices[:block], choice, *self.choices[block + 1 :]))


@dataclass(frozen=True)
class ElasticSpace:
    """For every elastic block its ascending width choices, resolved to integers.

    The order of the blocks is fixed: attention, then MLP, layer by layer (2L blocks).
    """

    blocks: tuple[Block, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def num_choices(self) -> int:
        """Choices of the block that has most of them (N of the one-hot encoding)."""
        return max(len(block.widths) for block in self.blocks)

    @property
    def num_sub_networks(self) -> int:
        """How many sub-networks the space holds."""
        return prod(len(block.widths) for block in self.blocks)

    def full(self) -> SubNetwork:
        """The dense model: every block at its largest choice."""
        return SubNetwork(tuple(len(block.widths) - 1 for block in self.blocks))

    def smallest(self) -> SubNetwork:
        """Every block at its smallest choice."""
        return SubNetwork((0,) * len(self))

    def uniform(self, mlp: float = 1.0, attention: float = 1.0) -> SubNetwork:
        """The same ratio in every layer: of each block the largest choice at or below the ratio.

        Raises:
            ValueError: if a block has no choice that small.
        """
        return SubNetwork(tuple(_at_most(b, mlp if b.kind == "mlp" else attention) for b in self.blocks))

    def random(self, generator: torch.Generator) -> SubNetwork:
        """Independent and uniform over the choices of each block (paper, section on elastic continued training)."""
        draws = torch.rand(len(self), generator=generator, dtype=torch.float64).tolist()
        return SubNetwork(tuple(int(draw * len(block.widths)) for draw, block in zip(draws, self.blocks, strict=True)))

    def random_uniform(self, generator: torch.Generator) -> SubNetwork:
        """One draw per kind of block, shared by all layers (ours: keeps the corners of the space trained)."""
        draw = dict(zip(KINDS, torch.rand(len(KINDS), generator=generator, dtype=torch.float64).tolist(), strict=True))
        return SubNetwork(tuple(int(draw[block.kind] * len(block.widths)) for block in self.blocks))

    def widths(self, sub_network: SubNetwork) -> tuple[int, ...]:
        """Units in use per block."""
        self.check(sub_network)
        return tuple(block.widths[c] for block, c in zip(self.blocks, sub_network.choices, strict=True))

    def one_hot(self, sub_network: SubNetwork) -> Tensor:
        """The sub-network as choice probabilities, [2L, N]; blocks with fewer choices leave the last columns 0."""
        self.check(sub_network)
        return torch.nn.functional.one_hot(torch.tensor(sub_network.choices), self.num_choices).float()

    @cached_property
    def exists(self) -> Tensor:
        """Which entries of a one-hot encoding stand for a choice that its block has: bool, [2L, N]."""
        counts = torch.tensor([len(block.widths) for block in self.blocks])
        return torch.arange(self.num_choices) < counts[:, None]

    def check(self, sub_network: SubNetwork) -> None:
        """Refuse a sub-network of another space.

        Raises:
            ValueError: if the number of blocks differs, or a choice does not exist.
        """
        if len(sub_network.choices) != len(self):
            raise ValueError(
                f"the sub-network has {len(sub_network.choices)} choices, the space {len(self)} blocks: "
                "it was made for another model"
            )
        for block, choice in zip(self.blocks, sub_network.choices, strict=True):
            if not 0 <= choice < len(block.widths):
                raise ValueError(f"choice {choice} of {block.name} does not exist: it has {len(block.widths)} widths")

    def to_json(self) -> list[dict[str, Any]]:
        """One row a block: layer, kind, widths."""
        return [{"layer": b.layer, "kind": b.kind, "widths": list(b.widths)} for b in self.blocks]

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]]) -> ElasticSpace:
        """Inverse of `to_json`, checked again.

        Raises:
            ValueError: if the widths of a row are not ascending integers.
        """
        return cls(tuple(_block(r["layer"], r["kind"], r["widths"], full=r["widths"][-1]) for r in rows))


def width_ratios(space: ElasticSpace) -> Tensor:
    """Width of every choice as a share of its block's full width, [2L, N]; 0 where a block has no such choice."""
    rows = [torch.tensor([width / block.full for width in block.widths]) for block in space.blocks]
    return pad_sequence(rows, batch_first=True)


def resolve(
    config: SpaceConfig, *, num_layers: int, neurons: int, kv_groups: int, cache_layers: Container[int] = (0,)
) -> ElasticSpace:
    """Turn ratios into integers and check everything once.

    Args:
        config: the choices as written by the user.
        num_layers: decoder layers of the model.
        neurons: full MLP width (intermediate_size).
        kv_groups: full attention width (num_key_value_heads).
        cache_layers: where the KV cache reads its length, so that attention cannot be skipped.

    Raises:
        ValueError: if widths do not ascend, a ratio is not a whole number of units, the last one is not the full
            width, a layer does not exist, or attention may be skipped where it cannot.
    """
    unknown = sorted(set(config.layers) - set(range(num_layers)))
    if unknown:
        raise ValueError(f"space.layers names layer {unknown[0]}, but the model has layers 0 to {num_layers - 1}")
    blocks: list[Block] = []
    for layer in range(num_layers):
        own = config.layers.get(layer, LayerWidths())
        mlp = config.mlp if own.mlp is None else own.mlp
        attention = own.attention
        if attention is None:
            attention = list(range(1, kv_groups + 1)) if config.attention is None else config.attention
            if layer in cache_layers and attention[:1] == [0]:
                # a list common to all layers means: skip wherever skipping works
                attention = attention[1:]
        blocks.append(_block(layer, "attention", attention, full=kv_groups, cache_layers=cache_layers))
        blocks.append(_block(layer, "mlp", mlp, full=neurons))
    return ElasticSpace(tuple(blocks))


def _block(
    layer: int, kind: BlockKind, choices: Sequence[int | float], *, full: int, cache_layers: Container[int] = (0,)
) -> Block:
    if kind not in KINDS:
        raise ValueError(f"a block is one of {', '.join(KINDS)}, not {kind!r}")
    name = f"layers.{layer}.{kind}"
    widths = tuple(_to_units(choice, full, name) for choice in choices)
    if not widths or any(low >= high for low, high in pairwise(widths)):
        raise ValueError(f"the widths of {name} must ascend, but are {list(widths)}")
    if widths[-1] != full:
        raise ValueError(f"the last width of {name} must be the full one, {full} (or 1.0), but is {widths[-1]}")
    block = Block(layer, kind, widths)
    check_skips(block, cache_layers)
    return block


def check_skips(block: Block, cache_layers: Container[int]) -> None:
    """Refuse a block that may be skipped where the KV cache reads its length.

    Raises:
        ValueError: if its attention has width 0 and its layer is one of those.
    """
    if block.layer in cache_layers and block.kind == "attention" and block.widths[0] == 0:
        raise ValueError(f"{block.name} cannot have width 0: the KV cache reads its length there; start at 1")


def _to_units(choice: int | float, full: int, name: str) -> int:
    units = choice * full if isinstance(choice, float) else choice
    if not 0 <= units <= full:
        raise ValueError(f"width {choice} of {name} is {units:g} units, outside 0 to {full}")
    # 0.55 of 100 is 55.00000000000001
    if abs(units - round(units)) > ROUNDING:
        raise ValueError(
            f"width {choice} of {name} is {units:g} of {full} units, not a whole number; "
            f"choose a ratio that divides {full}, or an integer"
        )
    return round(units)


def _at_most(block: Block, ratio: float) -> int:
    if not 0 <= ratio <= 1:
        raise ValueError(f"a width ratio lies in 0 to 1, but is {ratio}")
    fitting = [i for i, width in enumerate(block.widths) if width <= ratio * block.full + ROUNDING]
    if not fitting:
        raise ValueError(
            f"{block.name} has no width at or below {ratio} of {block.full}; its smallest is {block.widths[0]}"
        )
    return fitting[-1]
