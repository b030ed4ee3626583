"""The one form of every cost: a fixed part plus a number per block and choice."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from flextron_lit.files.digest import sha256_of_json
from flextron_lit.space import ElasticSpace, SubNetwork


@dataclass(frozen=True)
class CostTable:
    """`cost(a) = fixed + sum over blocks and choices of p[block, choice] * T[block, choice]` (paper, look-up table).

    Linear in the choice probabilities, hence differentiable. The same form serves counted costs and measured
    latencies (ours).
    """

    name: str
    """What is counted, for example `parameters`."""
    unit: str
    """Unit of `fixed` and `blocks`."""
    fixed: float
    """Cost of everything that is not elastic."""
    blocks: tuple[tuple[float, ...], ...]
    """Cost per block and choice: 2L rows of that block's number of choices."""
    reference: float | None = None
    """Cost of the network that ratios are of, where it is not the largest that the table has: a table of a dynamic
    router also holds what routing costs, and its ratios are of the full network run without (ours)."""

    @cached_property
    def full(self) -> float:
        """Cost of the full network, run statically: what ratios are of."""
        return self.fixed + sum(row[-1] for row in self.blocks) if self.reference is None else self.reference

    @cached_property
    def smallest(self) -> float:
        """The smallest cost that any sub-network has: measured tables need not rise with every width."""
        return self.fixed + sum(min(row) for row in self.blocks)

    @property
    def largest_ratio(self) -> float:
        """The largest cost that anything has, relative to the full network's: not 1 where there is a `reference`."""
        return (self.fixed + sum(max(row) for row in self.blocks)) / self.full

    @property
    def smallest_ratio(self) -> float:
        """The smallest cost relative to the full network's: the lowest budget that can be met."""
        return self.smallest / self.full

    def show(self, cost: float) -> str:
        """A cost with its unit, at a glance: 94.7M parameters, 312 ms."""
        short = self.short(cost)
        return short if self.unit == "ms" else f"{short} {self.unit}"

    def short(self, cost: float) -> str:
        """The same for a column that names what is counted: 94.7M, 312 ms."""
        if self.unit == "ms":
            return f"{cost:.4g} ms"
        for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
            if cost >= size:
                return f"{cost / size:.1f}{letter}"
        return f"{cost:.4g}"

    def cost(self, sub_network: SubNetwork) -> float:
        """Cost of one sub-network, in `unit`."""
        return self.fixed + sum(row[c] for row, c in zip(self.blocks, sub_network.choices, strict=True))

    def ratio(self, sub_network: SubNetwork) -> float:
        """Cost relative to the full network, in (0, 1]; above 1 is possible where there is a `reference`."""
        return self.cost(sub_network) / self.full

    def expected(self, probabilities: Tensor) -> Tensor:
        """Cost under choice probabilities.

        Args:
            probabilities: [..., 2L, N], rows summing to 1 over the choices that the block has.

        Returns:
            [...], in `unit`; gradients flow into `probabilities`.
        """
        return self.fixed + (probabilities * self.padded.to(probabilities)).sum((-2, -1))

    @cached_property
    def padded(self) -> Tensor:
        """Costs per block and choice, float64 [2L, N]; 0 where a block has no such choice."""
        width = max(len(row) for row in self.blocks)
        return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in self.blocks], dtype=torch.float64)

    @cached_property
    def sha256(self) -> str:
        """Digest of all of it: a router belongs to one table."""
        return sha256_of_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """All of it but what is None, JSON-able."""
        # tables had no reference once: one without it keeps the digest that it always had
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError: if a cost is no number, that of the full network is not above 0, or the name none for files.
        """
        blocks = tuple(tuple(map(float, row)) for row in data["blocks"])
        table = cls(str(data["name"]), str(data["unit"]), float(data["fixed"]), blocks, data.get("reference"))
        if not (table.full > 0 and math.isfinite(table.full + table.smallest + table.largest_ratio)):
            raise ValueError(f"the full network's {table.name} is {table.full}, the smallest one's {table.smallest}")
        if not table.name.isidentifier():
            raise ValueError(f"{table.name!r} is no name of a cost")
        return table

    def check(self, space: ElasticSpace) -> None:
        """Refuse a table of another space.

        Raises:
            ValueError: naming the first block whose number of choices differs.
        """
        if len(self.blocks) != len(space):
            raise ValueError(f"cost table {self.name!r} has {len(self.blocks)} blocks, the model {len(space)}")
        for block, row in zip(space.blocks, self.blocks, strict=True):
            if len(row) != len(block.widths):
                raise ValueError(
                    f"cost table {self.name!r} has {len(row)} choices for {block.name}, the model {len(block.widths)}"
                )


def weighted_sum(name: str, parts: Sequence[tuple[float, CostTable]], unit: str | None = None) -> CostTable:
    """One table from several of the same space and unit: `sum of weight x cost`, for example prefill and decode steps.

    It has a `reference` if any of them has one.

    Args:
        name: of the new table.
        parts: weight and table of each part, at least one.
        unit: of the new table, where the weights change it.
    """
    tables = [table for _, table in parts]
    units = {table.unit for table in tables}
    assert len(units) == 1, f"units differ: {units}"

    def total(costs: Sequence[float]) -> float:
        return sum(weight * cost for (weight, _), cost in zip(parts, costs, strict=True))

    rows = zip(*(table.blocks for table in tables), strict=True)
    blocks = tuple(tuple(total(costs) for costs in zip(*row, strict=True)) for row in rows)
    fixed = total([table.fixed for table in tables])
    own = all(table.reference is None for table in tables)
    reference = None if own else total([table.full for table in tables])
    return CostTable(name, unit or units.pop(), fixed, blocks, reference)
