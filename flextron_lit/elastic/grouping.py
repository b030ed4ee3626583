"""Tokens that take different widths of one block: sorted once, then computed band of units by band of units.

Widths are nested, so the tokens that use a band of units are those at the front of the order by falling width: a slice.
Every band is one matrix product over the rows that need it, forward and backward; nothing is masked (ours; method 6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Part = Callable[[Tensor, int], Tensor]
"""(tokens that use a band [..., features], index of the band) to what the band gives them, one row a token."""


@dataclass(frozen=True)
class Band:
    """Neighbouring units that the same tokens use."""

    start: int
    stop: int
    rows: int
    """Tokens that use it: so many from the front of the order."""

    def columns(self, rows: int) -> slice:
        """Where its units stand side by side with those of all bands, so many rows each."""
        return slice(self.start * rows, self.stop * rows)


@dataclass(frozen=True)
class TokenGroups:
    """The tokens of a pass in the order in which one block computes them."""

    order: Tensor | None
    """Flat indices [rows] of the tokens that use any unit, by falling width; None if all tokens use the same width, so
    that they stay where they are: in one band, or in none."""
    bands: tuple[Band, ...]
    """From the first unit on; empty if no token uses any."""

    @property
    def units(self) -> int:
        """Units that the widest token uses."""
        return self.bands[-1].stop if self.bands else 0

    def split(self, weight: Tensor, dim: int, rows: int = 1) -> tuple[Tensor, ...]:
        """Views of a weight, one a band, without the units that no token uses.

        Args:
            weight: carries units along `dim`; what lies behind them (a fused weight's keys and values) is left out.
            dim: where.
            rows: of a unit.
        """
        if self.order is None:
            return (weight.narrow(dim, 0, self.units * rows),)
        sizes = [(band.stop - band.start) * rows for band in self.bands]
        # one split and not a slice a band: the backward of each slice would write a gradient as large as the weight
        rest = weight.shape[dim] - sum(sizes)
        return weight.split([*sizes, rest] if rest else sizes, dim)[: len(sizes)]

    def add_up(self, inputs: Tensor, part: Part, bias: Tensor | None = None) -> Tensor:
        """Sum over the bands of what each gives to its tokens.

        Args:
            inputs: [B, T, features].
            part: [..., features] to [..., D].
            bias: [D], for every token that uses any unit.

        Returns:
            [B, T, D]; zeros for tokens that use no unit.
        """
        rows = self.gather(inputs)
        total = part(rows, 0)
        if bias is not None:
            total = total + bias
        for index, band in enumerate(self.bands[1:], 1):
            total[: band.rows] += part(rows[: band.rows], index)
        return self.scatter(total, inputs)

    def each_width(self, inputs: Tensor, part: Part, read: Callable[[Tensor, int], Tensor]) -> Tensor:
        """What every token's own width makes of the units that the bands give it; for widths that read differently.

        Args:
            inputs: [B, T, features]; some token uses some unit.
            part: [..., features] to [..., units of the band x rows of a unit].
            read: those of all bands of a width side by side, and the width, to [..., D].

        Returns:
            [B, T, D]; zeros for tokens that use no unit.
        """
        rows = self.gather(inputs)
        parts = [part(rows if self.order is None else rows[: band.rows], i) for i, band in enumerate(self.bands)]
        if self.order is None:
            return read(parts[0], self.units)
        # from the widest on: those of one width lie behind all that are wider
        stops = [band.rows for band in self.bands] + [0]
        widths = [
            read(torch.cat([own[start:stop] for own in parts[: i + 1]], -1), self.bands[i].stop)
            for i, (stop, start) in reversed(list(enumerate(pairwise(stops))))
        ]
        return self.scatter(torch.cat(widths), inputs)

    def spread(self, inputs: Tensor, part: Part) -> Tensor:
        """Side by side what the bands give to their tokens; zeros where a token does not use a band.

        Args:
            inputs: [B, T, features].
            part: [..., features] to [..., units of the band x rows of a unit].

        Returns:
            [B, T, units x rows of a unit], as wide as the widest token; without any unit, [B, T, 0].
        """
        if not self.bands:
            return inputs[..., :0]
        if self.order is None:
            return part(inputs, 0)
        own = self.gather(inputs)
        parts = [part(own[: band.rows], index) for index, band in enumerate(self.bands)]
        level = [torch.nn.functional.pad(each, (0, 0, 0, len(own) - len(each))) for each in parts]
        return self.scatter(torch.cat(level, -1) if len(level) > 1 else level[0], inputs)

    def gather(self, inputs: Tensor) -> Tensor:
        """Tokens that use any unit, by falling width: [B, T, features] to [rows, features], or as they are."""
        return inputs if self.order is None else inputs.flatten(0, -2).index_select(0, self.order)

    def scatter(self, rows: Tensor, inputs: Tensor) -> Tensor:
        """Inverse of `gather`, for tokens in the shape of inputs [B, T, ...]; zeros for those that use no unit."""
        if self.order is None:
            return rows
        tokens, features = inputs.shape[:-1], rows.shape[-1]
        return rows.new_zeros(tokens.numel(), features).index_copy_(0, self.order, rows).view(*tokens, features)


def group(widths: Sequence[int], choices: Tensor, real: Tensor | None = None) -> tuple[TokenGroups, list[int]]:
    """Sort the tokens of a pass by falling width, and count them.

    Args:
        widths: of the block, ascending; 0 is no width at all.
        choices: index into them, int64 [B, T].
        real: which tokens are no padding, bool [B, T]; None means all. Padding is in no band.

    Returns:
        The groups, and how many real tokens took each choice.
    """
    if choices.numel() == 1 and real is None:
        # a decode step: no sorting, no counting
        choice = int(choices)
        counts = [0] * len(widths)
        counts[choice] = 1
        return TokenGroups(None, (Band(0, widths[choice], 1),) if widths[choice] else ()), counts
    flat = choices.flatten()
    if real is not None:
        # behind all others, where no band reaches them
        flat = flat.masked_fill(~real.flatten(), -1)
    counts = torch.bincount(flat + 1, minlength=len(widths) + 1).tolist()[1:]
    bands = _bands(widths, counts)
    if len(bands) <= 1 and (not bands or bands[0].rows == len(flat)):
        return TokenGroups(None, bands), counts
    order = flat.argsort(descending=True, stable=True)
    return TokenGroups(order[: bands[0].rows], bands), counts


def _bands(widths: Sequence[int], counts: Sequence[int]) -> tuple[Band, ...]:
    """One band between two neighbouring widths that tokens take."""
    taken = [(width, count) for width, count in zip(widths, counts, strict=True) if count and width]
    rows = [sum(count for _, count in taken[index:]) for index in range(len(taken))]
    edges = pairwise([0, *(width for width, _ in taken)])
    return tuple(Band(start, stop, tokens) for (start, stop), tokens in zip(edges, rows, strict=True))
