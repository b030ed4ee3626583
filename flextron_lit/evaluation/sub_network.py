"""The sub-network for a budget: looked up where a router or a surrogate can say, else found by measuring losses."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.costs import CostTable
from flextron_lit.files.ranks import tell
from flextron_lit.latency.latency_table import LatencyTable
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.routers.from_budget import Routing, Selection
from flextron_lit.routers.search import SEARCHES, Search, best_by
from flextron_lit.space import SubNetwork

DEFAULT_SEARCH: Search = "uniform"
COUNT = 24
TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How a sub-network is to be found, as far as someone said so."""

    search: Search | Literal["router"] | None = None
    """None takes the router, the surrogate or the excess losses, else `DEFAULT_SEARCH`."""
    count: int | None = None
    """Losses to measure, in searches that can go on and on."""
    seed: int | None = None
    """Of their draws."""
    text: Path | None = None
    """What to measure losses on, in any notation; None means validation documents, where losses are measured at all."""
    tokens: int | None = None
    """Of the file, or of each domain."""


def answer(
    budget: str,
    folder: Path,
    costs: tuple[Mapping[str, CostTable], LatencyTable | None],
    device: torch.device,
    asked: Asked,
) -> Selection:
    """Find the sub-network for a budget.

    Args:
        budget: as a user writes it.
        folder: the Flextron checkpoint.
        costs: its `known_tables`.
        device: where to measure, if need be.
        asked: how.

    Raises:
        ValueError: for a budget that cannot be met or read, a router that is not there, or what has no effect.
    """
    tables, latency = costs
    space = checkpoint.read(folder).space
    routing = Routing.read(folder, space, tables, latency.may_miss if latency else {})
    limits = routing.parse(budget)
    named = ", ".join(f"{limit.table.name} <= {limit.table.show(limit.value)}" for limit in limits)
    if all(limit.loose for limit in limits):
        return Selection(budget, space.full(), f"no search: the full network meets {named}", None)
    if asked.search in (None, "router"):
        found = routing.answer(limits)
        if found is not None:
            _refuse_without_effect(asked, found.how)
            loss = _measured(asked, folder, device)[0](found.sub_network) if asked.text else None
            noted = {"calibrated" if found.measured else "predicted": found.loss}
            return Selection(budget, found.sub_network, found.how, loss, **noted, may_miss=found.may_miss)
    if asked.search == "router":
        raise ValueError(
            f"{folder} holds no router, no surrogate, no excess losses; take --search {', '.join(SEARCHES)}"
        )
    search, count = asked.search or DEFAULT_SEARCH, asked.count or COUNT
    measured, text = _measured(asked, folder, device)
    where = f", measured on {latency.conditions['device']['name']}" if latency else ""
    tell(f"{search} search: {named}{where}; losses on {text}")

    def score(sub_network: SubNetwork) -> float:
        loss = measured(sub_network)
        tell(f"  {loss:.3f} nats per token")
        return loss

    generator = torch.Generator().manual_seed(asked.seed or 0)
    chosen = best_by(search, space, limits, score, count=count, generator=generator)
    how = f"{search} search, {chosen.evaluations} losses measured on {text}"
    return Selection(budget, chosen.sub_network, how, chosen.score, may_miss=routing.misses(limits))


def _refuse_without_effect(asked: Asked, how: str) -> None:
    """Options of measured searches have no effect where nothing is searched by measuring."""
    given = {"count": asked.count, "seed": asked.seed, "tokens": None if asked.text else asked.tokens}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"--{name} has no effect on {how}; choose a search that measures with --search {', '.join(SEARCHES)}"
            )


def _measured(asked: Asked, folder: Path, device: torch.device) -> tuple[MeasuredLoss, str]:
    """The loss on the text that is asked for, and what to call the text."""
    loaded, tokens = load_elastic(str(folder), device=device), asked.tokens or TOKENS
    if asked.text is not None:
        return MeasuredLoss(loaded.backbone, loaded.batches_of(asked.text, tokens)), asked.text.name
    documents = loaded.held_out("validation", tokens)
    loss = MeasuredLoss(loaded.backbone, list(chain(*documents.values())))
    return loss, f"validation documents of {', '.join(documents)}"
