"""The fixed set of sub-networks whose loss is watched, and the table that it fills."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from flextron_lit.costs import CostTable
from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.space import KINDS, ElasticSpace, SubNetwork, width_ratios

MAX_LOSS = 700.0
ROUTED = "routed"
"""How the names of sub-networks that a router chose begin; the budget follows."""
DYNAMIC = "dynamic"
"""How the names of dynamic routers begin; the budget follows."""
FULL, STATIC, UNIFORM, RANDOM = "full", "static", "uniform", "random"
"""With `DYNAMIC` what a network is: the full one, a static router's answer, all layers alike, drawn at random."""


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
        return "-".join(part for part in parts if not part.endswith("100")) or FULL


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
        entries = [(FULL, space.full())]
        entries += [(u.name, space.uniform(u.mlp, u.attention)) for u in uniform]
        entries += [(f"random{cost:.2f}", sampling.at_cost(space, table, cost, generator)) for cost in costs]
        for (one, sub_network), (other, its) in combinations(entries, 2):
            if one == other or sub_network == its:
                raise ValueError(f"validation lists the same sub-network twice, as {one} and {other}; leave one out")
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
    """Token-weighted loss of S sub-networks on D domains, and what they chose; sums, so that ranks add up exactly.

    Args:
        sub_networks: S.
        domains: D.
        space: the choices.
    """

    full_state_update = False
    total: Tensor
    tokens: Tensor
    choices: Tensor

    def __init__(self, sub_networks: int, domains: int, space: ElasticSpace) -> None:
        super().__init__()
        shape = (sub_networks, domains)
        sizes = {"total": shape, "tokens": shape, "choices": (*shape, len(space), space.num_choices)}
        for name, size in sizes.items():
            self.add_state(name, default=torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sub_network: int, domain: int, total: Tensor, tokens: Tensor, choices: Tensor) -> None:
        """Add one batch: its summed loss in nats, its number of predicted tokens, and how often a choice was taken."""
        self.total[sub_network, domain] += total
        self.tokens[sub_network, domain] += tokens
        self.choices[sub_network, domain] += choices.to(self.choices)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Loss in nats per token [S, D], nan where nothing was seen; shares of the choices [S, D, 2L, N].

        A loss that is no number is infinite: a network lost itself, which is something else than no text.
        """
        losses = self.total.nan_to_num(nan=math.inf, posinf=math.inf) / self.tokens
        return losses, self.choices / self.choices.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Watched:
    """A sub-network to watch, or a router that chooses for every token."""

    selection: SubNetwork | DynamicPolicy
    costs: CostTable
    """What it costs: a dynamic router has a table of its own."""

    def took(self, space: ElasticSpace) -> Tensor:
        """How often each choice was taken since the last time of asking, [2L, N]."""
        if isinstance(self.selection, SubNetwork):
            return space.one_hot(self.selection)
        return self.selection.take()

    def ratio(self, shares: Tensor) -> float:
        """What it costs relative to the full network, from how often it took each choice, [2L, N]."""
        return float(self.costs.expected(shares)) / self.costs.full


@dataclass(frozen=True)
class ValidationResult:
    """Losses of the watched sub-networks at one step."""

    space: ElasticSpace
    watched: dict[str, Watched]
    """S of them by name."""
    domains: list[str]
    """D names."""
    losses: Tensor
    """[S, D], nats per token."""
    shares: Tensor
    """Of the tokens that took each choice, [S, D, 2L, N]."""

    @property
    def costs(self) -> CostTable:
        """The table that the first of them, the full network, has its cost from: names what is counted."""
        return next(iter(self.watched.values())).costs

    @property
    def mean_loss(self) -> float:
        """Mean over sub-networks and domains, in nats per token; where routers answer, over those and the full network.

        Infinite where a loss is no number. Domains of which nothing was seen do not count.

        What a stage is there for: tuning for what budgets get may cost networks that no budget gets.
        """
        answers = [name.startswith((ROUTED, DYNAMIC)) for name in self.watched]
        counted = [
            answer or name == FULL or not any(answers) for name, answer in zip(self.watched, answers, strict=True)
        ]
        return float(self.losses[torch.tensor(counted)].nanmean())

    def metrics(self, prefix: str) -> dict[str, float]:
        """Under stable names: `<prefix>/<sub-network>/<domain>/loss` and `/perplexity`, and the mean loss of each.

        What a dynamic router costs depends on the text: `/cost`, as a ratio of the full network's.
        """
        found: dict[str, float] = {}
        for name, watched, domain, loss, shares in self._cells():
            found[f"{prefix}/{name}/{domain}/loss"] = loss
            found[f"{prefix}/{name}/{domain}/perplexity"] = perplexity(loss)
            if not isinstance(watched.selection, SubNetwork):
                found[f"{prefix}/{name}/{domain}/cost"] = watched.ratio(shares)
        means = zip(self.watched, self.losses.mean(1).tolist(), strict=True)
        return found | {f"{prefix}/{name}/mean/loss": mean for name, mean in means}

    def rows(self, step: int) -> list[dict[str, Any]]:
        """One row a sub-network and domain, for files.

        Costs are ratios times what the full network costs by the first table: a dynamic router's own table may be of
        other minutes of the machine.
        """
        return [
            {
                "step": step,
                "sub_network": name,
                "domain": domain,
                "loss": loss,
                "perplexity": perplexity(loss),
                self.costs.name: watched.ratio(shares) * self.costs.full,
                "cost_ratio": watched.ratio(shares),
                **{f"{kind}_width": mean for kind, mean in mean_widths(self.space, shares).items()},
            }
            for name, watched, domain, loss, shares in self._cells()
        ]

    def _cells(self) -> Iterator[tuple[str, Watched, str, float, Tensor]]:
        """Of every sub-network in every domain: name, domain, loss, and the shares of its choices [2L, N]."""
        for (name, watched), losses, by_domain in zip(self.watched.items(), self.losses, self.shares, strict=True):
            for domain, loss, shares in zip(self.domains, losses.tolist(), by_domain, strict=True):
                yield name, watched, domain, loss, shares


def mean_widths(space: ElasticSpace, shares: Tensor) -> dict[str, float]:
    """Mean share of the full width over the layers, by kind of block.

    Args:
        space: the choices.
        shares: of the tokens that took each choice, [2L, N]; one-hot for a sub-network.
    """
    ratios = (shares * width_ratios(space).to(shares)).sum(-1).tolist()
    pairs = list(zip(space.blocks, ratios, strict=True))
    return {kind: fmean(ratio for block, ratio in pairs if block.kind == kind) for kind in KINDS}


def perplexity(loss: float) -> float:
    """Of a loss in nats per token; infinite where it does not fit a float."""
    return math.exp(loss) if loss < MAX_LOSS else math.inf
