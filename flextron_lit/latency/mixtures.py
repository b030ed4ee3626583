"""Mixtures: which share of the tokens takes each choice of each block, and a policy that realises one (ours)."""

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.elastic.selection import CountingPolicy
from flextron_lit.space import KINDS, BlockKind, ElasticSpace

ALIKE = 0.6
"""Probability that all tokens of a block choose alike in mixtures like a trained router's: 0.52 to 0.68 were seen."""
STEEPNESS = 4.0
"""Largest difference of log shares between the widest and the narrowest choice, but for the random part."""
DRAWN_TOKENS = 32
"""Choices of a block that a policy has at least: passes over few tokens differ from each other."""
STEPS: dict[BlockKind, float] = {"attention": 0.7548776662466927, "mlp": 0.5698402909980532}
"""Steps whose multiples cover the unit square evenly, however many there are (Roberts' R2 sequence)."""

Product = tuple[Tensor, Tensor]
"""Weight [N, D] and bias [N] of a block's router."""


def shares(space: ElasticSpace, number: int) -> Tensor:
    """A mixture: shares of the choices of every block, float64 [2L, N], rows summing to 1.

    Mostly narrow or mostly wide, for each kind of block apart: neighbouring numbers spread evenly over both. Blocks of
    a kind have the same shares in even mixtures, but for choices that a block lacks; in odd ones every block its own.
    In mixtures like a trained router's (`like_trained`) all tokens of many blocks choose alike: there is nothing to
    sort.

    Args:
        space: the choices.
        number: of the mixture, from 0.
    """
    generator = torch.Generator().manual_seed(number)
    found = torch.zeros(len(space), space.num_choices, dtype=torch.float64)
    for kind in KINDS:
        of_kind = [(index, block.widths) for index, block in enumerate(space.blocks) if block.kind == kind]
        widths = sorted({width for _, own in of_kind for width in own})
        tilt = 2 * ((number + 1) * STEPS[kind] % 1) - 1
        slope = STEEPNESS * tilt * torch.linspace(-0.5, 0.5, len(widths), dtype=torch.float64)

        def drawn(slope: Tensor = slope) -> Tensor:
            return torch.empty_like(slope).exponential_(generator=generator) * slope.exp()

        common = drawn()
        for index, own in of_kind:
            weights = (drawn() if number % 2 else common)[[widths.index(width) for width in own]]
            if like_trained(number) and torch.rand((), generator=generator) < ALIKE:
                weights = F.one_hot(weights.argmax(), len(own))
            found[index, : len(own)] = weights / weights.sum()
    return found


def like_trained(number: int) -> bool:
    """Whether a mixture is like those of trained routers, which tell layers apart more than tokens: two of four are."""
    return number % 4 >= 2


def router_products(backbone: ElasticBackbone, number: int = 0) -> list[Product]:
    """Random weights of a router for every block, where and as its network computes."""
    generator = torch.Generator().manual_seed(number)
    model = backbone.model
    features = model.config.hidden_size

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

    return [(drawn(len(b.widths), features), drawn(len(b.widths))) for b in backbone.space.blocks]


class DrawnChoices(CountingPolicy):
    """A policy that does a router's work, a product and an arg-max a block, and answers what was drawn beforehand.

    So its passes take as long as those of a router whose tokens choose in given shares.

    Args:
        products: of the routers, one a block.
        mixture: shares that choices are drawn with, token by token and block by block, [2L, N].
        batch: B of the passes.
        tokens: T of the passes.
        generator: source of the draws.
    """

    def __init__(
        self, products: Sequence[Product], mixture: Tensor, batch: int, tokens: int, generator: torch.Generator
    ) -> None:
        passes = ceil(DRAWN_TOKENS / (batch * tokens))
        drawn = torch.multinomial(mixture, passes * batch * tokens, replacement=True, generator=generator)
        self.shares = F.one_hot(drawn, mixture.shape[-1]).double().mean(1)
        """Shares of what was drawn, float64 [2L, N]."""
        rows = drawn.view(len(drawn), passes, batch * tokens)
        self.mixed = float((rows != rows[..., :1]).any(-1).double().mean())
        """Share of the blocks, over all passes, whose tokens choose differently."""
        self.products = products
        # lists, as a router has them: an index into a tensor a block costs as much as the product
        by_pass = drawn.view(-1, passes, batch, tokens).to(products[0][0].device)
        self.choices = [list(row.unbind()) for row in by_pass.unbind()]
        self.tally = [[0] * len(bias) for _, bias in products]
        self.turn = 0

    def begin(self, real: Tensor | None) -> None:
        """The next pass takes the next choices."""
        self.turn = (self.turn + 1) % len(self.choices[0])

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """Choice index of every token, [B, T]."""
        F.linear(hidden_states, *self.products[block]).argmax(-1)
        return self.choices[block][self.turn]
