"""What holds of prices whatever a training gave: a budget is met, or its cost jumps over it and the price is past that.

Tokens that are alike give way together, so how near a mean cost comes to a budget is a matter of the weights; that the
price is as good as prices get, is not.
"""

import torch

from flextron_lit.routers.budget_prices import EDGE, TOLERANCE, TRIES, solve, spendable
from flextron_lit.stages import loss_measuring as measuring


class Solved:
    """Of the last search for every target: the prices that were asked for, each with the mean cost that it has."""

    def __init__(self, monkeypatch):
        self.tried = {}
        monkeypatch.setattr(measuring, "solve", self._solve)

    def _solve(self, mean_cost, target, *rest):
        tried = self.tried[target] = {}

        def noted(price):
            tried[price] = mean_cost(price)
            return tried[price]

        return solve(noted, target, *rest)

    def check(self, prices, table):
        """Every price is the one that its search had to end with, and its ratio is what that price costs."""
        for row in prices.rows:
            target = spendable(row.budget, table)
            tried = self.tried[target]
            assert row.ratio == tried[row.price]
            if abs(row.ratio - target) <= TOLERANCE * target:
                continue
            assert row.ratio < target
            # two narrowings leave half of what the edges of a bracket leave
            narrowed = (0.5 * (1 - EDGE)) ** (TRIES // 2) * (max(tried) - min(tried))
            assert any(cost > target for price, cost in tried.items() if 0 < row.price - price <= narrowed + 1e-9)


@torch.no_grad()
def cost_of(stage, policy, batches):
    """Mean cost ratio of a policy on some batches, by what each token takes."""
    policy.take()
    with stage.backbone.use(policy):
        for batch in batches:
            stage.predictions(batch)
    counts = policy.take()
    return float(policy.table.expected(counts / counts.sum(-1, keepdim=True)) / policy.table.full)
