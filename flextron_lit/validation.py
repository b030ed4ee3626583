"""The fixed set of sub-networks whose loss is watched, and the table that it fills."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from flextron_lit import sampling
from flextron_lit.costs import CostTable
from flextron_lit.space import KINDS, ElasticSpace, SubNetwork

MAX_LOSS = 700.0


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

    uniform: list[Uniform] = field(
        default_factory=lambda: [
            Uniform(mlp=0.75),
            Uniform(mlp=0.5),
            Uniform(mlp=0.25),
            Uniform(attention=0.67),
            Uniform(mlp=0.5, attention=0.67),
        ]
    )
    """Sub-networks with the same ratio in every layer."""
    random_costs: list[float] = field(default_factory=lambda: [0.85, 0.7])
    """One random sub-network at each of these ratios of the full network's parameters."""
    seed: int = 0
    """Seed of the random ones; the same seed gives the same sub-networks in every run."""

    def resolve(self, space: ElasticSpace, table: CostTable) -> dict[str, SubNetwork]:
        """Name and sub-network, the full one first.

        Raises:
            ValueError: if two entries are the same sub-network, or one does not exist in the space.
        """
        generator = torch.Generator().manual_seed(self.seed)
        named = {"full": space.full()}
        named |= {u.name: space.uniform(u.mlp, u.attention) for u in self.uniform}
        named |= {f"random{cost:.2f}": sampling.at_cost(space, table, cost, generator) for cost in self.random_costs}
        expected = 1 + len(self.uniform) + len(self.random_costs)
        if len(named) != expected or len(set(named.values())) != expected:
            raise ValueError(
                f"the validation set names {expected} sub-networks but only {len(set(named.values()))} differ: "
                "two ratios fall on the same width; leave one out"
            )
        return named


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
