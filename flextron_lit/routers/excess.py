"""The table of excess losses: what each block loses at each width by itself, computed and not measured (ours).

It answers budgets before a surrogate exists: the sum over blocks is to be small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flextron_lit.costs import CostTable
from flextron_lit.costs.sub_network_sampling import budgets, stratified
from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.whole_file import json_text
from flextron_lit.routers.feasible_decoding import Additive
from flextron_lit.space import ElasticSpace, SubNetwork

FILE = "elastic/excess_losses.json"
POWER = 0.7
"""Of an entry in the sum: to second order large errors are overrated, since losses saturate."""

LEAST = 1e-6
"""Nats per token, and by what share of it a layer loses more than the one before, so that layers go in their order."""
ROUNDING = 1e-9
"""Of prices: less than what parts two layers, more than what parts the blocks of one."""
MOST = 0.95
"""Of what a layer loses, for one of its blocks: where the other saves nothing, nobody skips it alone."""

SPREAD = 0.5
"""Standard deviation of the logarithm by which an entry is taken for larger or smaller than it is."""


@dataclass(frozen=True)
class ByLayer(Additive):
    """What is to be small is a sum over blocks, but of layers that lack one of both: those count as if both were gone.

    So a search that takes one block finds the other one free, and puts neither back alone.
    """

    layers: tuple[int, ...]
    """That may be skipped as a whole."""

    def whole(self, choices: Tensor) -> Tensor:
        """Choices [..., 2L] in which layers that may be skipped lack both blocks where they lack one.

        A search takes no more blocks than it has to, and models of whole layers load everywhere.
        """
        choices = choices.clone()
        for layer in self.layers:
            both = choices[..., 2 * layer : 2 * layer + 2]
            both[(both == 0).any(-1)] = 0
        return choices

    def __call__(self, one_hot: Tensor) -> Tensor:
        """Choices [..., 2L, N] to their sum, [...]."""
        return self._sum(one_hot.argmax(-1)) if self.layers else super().__call__(one_hot)

    def after_changes(self, choices: Tensor) -> Tensor:
        """Sums after every change of a single block, [R, 2L] to [R, 2L, N]."""
        if not self.layers:
            return super().after_changes(choices)
        each = torch.arange(len(self.effects))
        changed = choices[:, None, None].repeat(1, *self.effects.shape, 1)  # [R, 2L, N, 2L]
        changed[:, each, :, each] = torch.arange(self.effects.shape[1])
        return self._sum(changed)

    def _sum(self, choices: Tensor) -> Tensor:
        return self.effects[torch.arange(len(self.effects)), self.whole(choices)].sum(-1)


@dataclass(frozen=True)
class ExcessTable:
    """Nats per token that a block at a width adds to the loss, all others at full width; to second order."""

    blocks: tuple[tuple[float, ...], ...]
    """2L rows of that block's number of choices, the last 0."""
    tokens: int
    """That it was computed on."""
    layers: Mapping[int, float] = field(default_factory=dict)
    """Layers that may be skipped as a whole, those first that go first, with what each adds behind them (measured)."""

    def objective(self, table: CostTable) -> ByLayer:
        """What a search makes small: no loss, but networks that it ranks low lose little.

        Where whole layers may be skipped, what one loses is shared out over its two blocks by what they save, so that
        at any price of cost both go at once, and layers in their order.

        Args:
            table: the cost that the search saves.
        """
        rows = [torch.tensor(row).clamp(min=0) ** POWER for row in self.blocks]
        effects = pad_sequence(rows, batch_first=True).double()
        worst = LEAST
        for layer, lost in self.layers.items():
            worst = max(worst * (1 + LEAST), lost)
            effects[2 * layer : 2 * layer + 2, 0] = worst**POWER * self._shares(layer, table)
        return ByLayer(effects, tuple(self.layers))

    def _shares(self, layer: int, table: CostTable) -> Tensor:
        """Of what a layer's absence saves, attention and MLP: [2]."""
        blocks = range(2 * layer, 2 * layer + 2)
        saved = torch.stack([table.padded[i, len(self.blocks[i]) - 1] - table.padded[i, 0] for i in blocks])
        attention = (saved[0] / saved.sum()).nan_to_num(0.5).clamp(1 - MOST, MOST)
        return torch.stack([attention, 1 - attention])

    def draw(
        self,
        space: ElasticSpace,
        table: CostTable,
        k: int,
        generator: torch.Generator,
        spread: float = SPREAD,
        among: Sequence[float] | None = None,
    ) -> list[SubNetwork]:
        """Sub-networks such as budgets get: one from each of k equal ranges of cost, good there by these losses (ours).

        Each by the losses times random factors, since they are no more than an estimate, and so that the sub-networks
        around the best ones are drawn too. It is a strategy, as those of `sub_network_sampling` are.

        Args:
            space: of the network.
            table: of the costs.
            k: how many.
            generator: of budgets and factors.
            spread: of the factors' logarithms; 0 draws the best ones alone.
            among: cost ratios to draw from in place of all; one that stands there twice is drawn twice as often.
        """
        effects = self.objective(table).effects
        noise = torch.randn(k, *effects.shape, generator=generator, dtype=torch.float64)
        for layer in self.layers:
            # both blocks of a layer go at once
            noise[:, 2 * layer, 0] = noise[:, 2 * layer + 1, 0]
        if among is None:
            ratios = torch.tensor(budgets(table.smallest_ratio, k, generator), dtype=torch.float64)
        else:
            given = torch.tensor(among, dtype=torch.float64)
            ratios = given[torch.randint(len(given), [k], generator=generator)]
        choices = _cheapest(effects * (spread * noise).exp(), table.padded, ratios * table.full - table.fixed, space)
        return [SubNetwork(tuple(row)) for row in choices.tolist()]

    def drawn_or_stratified(
        self, space: ElasticSpace, table: CostTable, k: int, generator: torch.Generator
    ) -> list[SubNetwork]:
        """Half of them such as budgets get, the others evenly over cost."""
        return self.draw(space, table, k // 2, generator) + stratified(space, table, k - k // 2, generator)

    def to_bytes(self, space: ElasticSpace) -> bytes:
        """A JSON file that people can read, a row a block by its name."""
        named = {block.name: list(row) for block, row in zip(space.blocks, self.blocks, strict=True)}
        layers = [{"layer": layer, "loss": loss} for layer, loss in self.layers.items()]
        content: dict[str, Any] = {"unit": "nats per token", "tokens": self.tokens, "blocks": named, "layers": layers}
        return json_text(content).encode()

    @classmethod
    def read(cls, folder: Path, space: ElasticSpace) -> Self | None:
        """The table of a Flextron checkpoint; None if it has none.

        Raises:
            ValueError: if the file is damaged, or belongs to another space.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        with damage(path, "convert the model again", what="is damaged, or of another space"):
            content = read_json(path)
            rows = tuple(tuple(map(float, content["blocks"][block.name])) for block in space.blocks)
            if [len(row) for row in rows] != [len(block.widths) for block in space.blocks]:
                raise ValueError("its rows are not those of the space")
            # those of before whole layers could be skipped have none
            layers = {int(row["layer"]): float(row["loss"]) for row in content.get("layers", ())}
            return cls(rows, int(content["tokens"]), layers)


def _cheapest(effects: Tensor, costs: Tensor, limits: Tensor, space: ElasticSpace) -> Tensor:
    """Choices of least loss plus price times cost, at the price at which the cost comes nearest below a limit, [k, 2L].

    Args:
        effects: what is lost, [k, 2L, N].
        costs: [2L, N].
        limits: of the sum over blocks, [k].
        space: the choices there are.
    """

    def chosen(price: Tensor) -> Tensor:
        total = effects + price[:, None, None] * costs
        return total.masked_fill(~space.exists, torch.inf).argmin(-1)

    # at the largest price nothing but cost counts
    low = torch.zeros_like(limits)
    high = torch.full_like(limits, float(effects.max() / _least_step(costs)) + 1)
    for _ in range(60):
        price = (low + high) / 2
        over = costs.gather(1, chosen(price).T).sum(0) > limits
        low, high = torch.where(over, price, low), torch.where(over, high, price)
    # both blocks of a layer that goes as a whole are to go, and rounding parts them
    return chosen(high * (1 + ROUNDING))


def _least_step(costs: Tensor) -> Tensor:
    """The smallest difference of cost that two choices of a block have, above 0."""
    steps = costs.diff(dim=1).abs()
    return steps[steps > 0].min()
