"""The static router: from a budget to a choice for every block (paper, static routers)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from flextron_lit.costs.table import CostTable
from flextron_lit.space import ElasticSpace


class StaticRouter(nn.Module):
    """A small MLP from the budget to logits over the choices of all blocks.

    Args:
        space: the choices.
        hidden: width of both hidden layers.
        generator: source of the first weights.
    """

    smallest: Tensor
    """The smallest cost ratio possible; budgets are scaled so that it and 1 are the ends. `scale_to` sets it."""
    exists: Tensor

    def __init__(self, space: ElasticSpace, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.shape = (len(space), space.num_choices)
        widths = (1, hidden, hidden, self.shape[0] * self.shape[1])
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        # by a generator of its own, not torch's global one: two routers of one seed start alike wherever they are made
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.uniform_(layer.bias, -1.0, 1.0, generator=generator)
        nn.init.zeros_(layers[-1].bias)
        self.layers = nn.ModuleList(layers)
        self.register_buffer("smallest", torch.tensor(0.0))
        self.register_buffer("exists", space.exists)

    def scale_to(self, table: CostTable) -> None:
        """Take the range of budgets from a cost table.

        Raises:
            ValueError: if all sub-networks cost the same, so that there is nothing to choose by.
        """
        if table.smallest >= table.full:
            raise ValueError(
                f"every sub-network has the same {table.name}, {table.show(table.full)}: a router for it has nothing "
                "to choose; take another cost"
            )
        self.smallest.fill_(table.smallest_ratio)

    def forward(self, budgets: Tensor) -> Tensor:
        """Cost ratios [B] to logits [B, 2L, N]; -inf where a block has no such choice."""
        hidden = ((budgets.float() - self.smallest) / (1 - self.smallest) * 2 - 1)[:, None]
        with torch.autocast(hidden.device.type, enabled=False):
            for layer in self.layers[:-1]:
                hidden = nn.functional.silu(layer(hidden))
            logits = self.layers[-1](hidden).unflatten(-1, self.shape)
        return logits.masked_fill(~self.exists, -torch.inf)
