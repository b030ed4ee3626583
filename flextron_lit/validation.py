"""The fixed set of sub-networks whose loss is watched, and the table that it fills."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from flextron_lit import sampling
from flextron_lit.costs import CostTable
from flextron_lit.space import KINDS, ElasticSpace, SubNetwork

MAX_LOSS = 700.0
ROUTED = "routed"
"""How the names of sub-networks that a router chose begin; the budget follows."""


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """One ratio for all MLPs and one for all attention modules."""

    mlp: float = 1.0
    """Ratio of the MLP width; the largest choice at or below it is taken."""
    attention: float = 1.0
    """Ratio of the attention width; the largest choice at or below it is taken."""

    @property
    def name(self) -> str:
        """For example `mlp50-attention67`."""
        parts = [f"{kind}{ratio * 100:.0f}" for kind, ratio in (("mlp", self.mlp), ("attention", self.attention))]
        return "-".join(part for part in parts if not part.endswith("100")) or "full"


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Sub-networks to validate, beside the full network, which always is."""

    uniform: list[Uniform] | None = None
    """Sub-networks with the same ratio in every layer; None means one for each MLP choice of the space, one with
    narrower attention, and one with both."""
    random_costs: list[float] | None = None
    """One random sub-network at each of these ratios of the full network's parameters; None means two, evenly spaced
    between the smallest and the full network."""
    seed: int = 0
    """Seed of the random ones; the same seed gives the same sub-networks in every run."""

    def resolve(self, space: ElasticSpace, table: CostTable) -> dict[str, SubNetwork]:
        """Name and sub-network, the full one first.

        Raises:
            ValueError: if two entries are the same sub-network, or one does not exist in the space.
        """
        generator = torch.Generator().manual_seed(self.seed)
        uniform = typical(space) if self.uniform is None else self.uniform
        costs = spread(table.ratio(space.smallest())) if self.random_costs is None else self.random_costs
        entries = [("full", space.full())]
        entries += [(u.name, space.uniform(u.mlp, u.attention)) for u in uniform]
        entries += [(f"random{cost:.2f}", sampling.at_cost(space, table, cost, generator)) for cost in costs]
        for index, (name, sub_network) in enumerate(entries):
            for other_name, other in entries[:index]:
                if name == other_name or sub_network == other:
                    raise ValueError(
                        f"validation lists the same sub-network twice, as {other_name} and {name}; leave one out"
                    )
        return dict(entries)


def typical(space: ElasticSpace) -> list[Uniform]:
    """Uniform sub-networks that show a space: each MLP choice, narrower attention, and both at once (ours)."""
    ratios: dict[str, list[float]] = {
        block.kind: [width / block.full for width in block.widths[:-1] if width] for block in space.blocks[:2]
    }
    alone = [Uniform(mlp=ratio) for ratio in reversed(ratios["mlp"])]
    narrow = [Uniform(attention=ratio) for ratio in ratios["attention"][-1:]]
    half = ratios["mlp"][len(ratios["mlp"]) // 2 :][:1]
    both = [Uniform(mlp=mlp, attention=n.attention) for mlp in half for n in narrow]
    return alone + narrow + both


def spread(smallest: float) -> list[float]:
    """Two cost ratios, evenly spaced between the smallest and 1; none where there is no room."""
    step = (1 - smallest) / 3
    return [round(1 - step, 2), round(1 - 2 * step, 2)] if step > 0.02 else []


class LossTable(Metric):
    """Token-weighted loss of S sub-networks on D domains; sums and counts, so that ranks add up exactly."""

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self, sub_networks: int, domains: int) -> None:
        super().__init__()
        for name in ("total", "tokens"):
            zeros = torch.zeros(sub_networks, domains, dtype=torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")

    def update(self, sub_network: int, domain: int, total: Tensor, tokens: Tensor) -> None:
        """Add one batch: its summed loss in nats and its number of predicted tokens."""
        self.total[sub_network, domain] += total
        self.tokens[sub_network, domain] += tokens

    def compute(self) -> Tensor:
        """Loss in nats per token, [S, D]; nan where nothing was seen."""
        return self.total / self.tokens


@dataclass(frozen=True)
class ValidationResult:
    """Losses of the watched sub-networks at one step."""

    space: ElasticSpace
    costs: CostTable
    sub_networks: dict[str, SubNetwork]
    """S sub-networks by name."""
    domains: list[str]
    """D names."""
    losses: Tensor
    """[S, D], nats per token."""

    @property
    def mean_loss(self) -> float:
        """Mean over sub-networks and domains, in nats per token."""
        return float(self.losses.mean())

    def metrics(self, prefix: str) -> dict[str, float]:
        """Under stable names: `<prefix>/<sub-network>/<domain>/loss` and `/perplexity`, and the mean loss of each."""
        flat: dict[str, float] = {}
        for name, row in zip(self.sub_networks, self.losses.tolist(), strict=True):
            for domain, loss in zip(self.domains, row, strict=True):
                flat[f"{prefix}/{name}/{domain}/loss"] = loss
                flat[f"{prefix}/{name}/{domain}/perplexity"] = perplexity(loss)
            flat[f"{prefix}/{name}/mean/loss"] = sum(row) / len(row)
        return flat

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One row a sub-network and domain, for files."""
        return [
            {
                "step": step,
                "sub_network": name,
                "domain": domain,
                "loss": loss,
                "perplexity": perplexity(loss),
                self.costs.name: self.costs.cost(sub_network),
                **self._mean_widths(sub_network),
            }
            for (name, sub_network), row in zip(self.sub_networks.items(), self.losses.tolist(), strict=True)
            for domain, loss in zip(self.domains, row, strict=True)
        ]

    def _mean_widths(self, sub_network: SubNetwork) -> dict[str, float]:
        widths = list(zip(self.space.blocks, self.space.widths(sub_network), strict=True))
        ratios = {kind: [width / block.full for block, width in widths if block.kind == kind] for kind in KINDS}
        return {f"{kind}_width": sum(values) / len(values) for kind, values in ratios.items()}


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; infinite where it does not fit a float."""
    return math.exp(loss) if loss < MAX_LOSS else math.inf
