"""Which networks are evaluated: the full one, and what each budget gets from every way there is to answer it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.files.ranks import tell
from flextron_lit.generation.call import Chosen, chosen, notes_told
from flextron_lit.model import FlextronModel
from flextron_lit.routers.search import Score, best_uniform, uniform_pairs
from flextron_lit.routers.trained import TrainedDynamicRouter
from flextron_lit.space import SubNetwork
from flextron_lit.stages.validation import FULL, UNIFORM

Way = Literal["static", "dynamic", "uniform"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Network(Chosen):
    """A network to evaluate."""

    way: str = field(kw_only=True)
    """`full`, or how its budget was answered."""

    @property
    def name(self) -> str:
        """For people: `static 0.6`."""
        return self.way if self.budget is None else f"{self.way} {self.budget}"

    def about(self) -> dict[str, Any]:
        """What it is, JSON-able."""
        choices = self.selection.to_json() if isinstance(self.selection, SubNetwork) else None
        return {"network": self.way, "budget": self.budget, "how": self.how, "sub_network": choices}


def ways_of(
    loaded: Loaded, wanted: Sequence[Way] | None, budgets: Sequence[str], latency: str | None = None
) -> list[Way]:
    """How budgets are answered: as asked for, or in all ways that the checkpoint can.

    Raises:
        ValueError: if something was asked for that it cannot, or it has no router at all.
    """
    if not budgets:
        return []
    routing = loaded.routing(latency)
    can: dict[Way, bool] = {
        "static": routing.answers,
        "dynamic": bool(TrainedDynamicRouter.read_all(loaded.folder, loaded.backbone.space)),
        # not where layers are whole or skipped
        "uniform": len(list(uniform_pairs(loaded.backbone.space))) > 1,
    }
    if wanted is None:
        if not (can["static"] or can["dynamic"]):
            raise ValueError(
                f"{loaded.folder} has nothing to answer budgets with; convert the model (`convert`), train routers, or "
                "evaluate the best uniform sub-networks alone with --networks uniform"
            )
        return [way for way in WAYS if can[way]]
    missing = [way for way in wanted if not can[way]]
    if missing:
        there = ", ".join(way for way in WAYS if can[way])
        lacks = "sub-networks with all layers alike" if missing[0] == UNIFORM else f"{missing[0]} router"
        raise ValueError(f"{loaded.folder} has no {lacks}; what can answer budgets there: {there}")
    return [way for way in WAYS if way in wanted]


def routed(model: FlextronModel, budgets: Sequence[str], ways: Sequence[Way], latency: str | None) -> list[Network]:
    """What routers answer to each budget in each of their ways; nothing is measured.

    Args:
        model: the elastic network with its routers.
        budgets: as a user writes them.
        ways: how they are answered; uniform ones are left out, but their budgets are read.
        latency: name of the latency table that static and uniform ones go by, where there are several.

    Raises:
        ValueError: if a budget cannot be read or met.
    """
    found = []
    for budget in budgets:
        if UNIFORM in ways:
            model.flextron.routing(latency).parse(budget)
        found += [_routed(model, budget, way, latency) for way in ways if way != UNIFORM]
    return found


def _routed(model: FlextronModel, budget: str, way: Way, latency: str | None) -> Network:
    dynamic = way == "dynamic"
    try:
        with notes_told(tell):
            choice = chosen(model, budget, dynamic=dynamic, latency=None if dynamic else latency)
    except ValueError as error:
        raise ValueError(f"{error}; --networks says which kinds of network to evaluate") from error
    return Network(**vars(choice), way=way)


def uniform(model: FlextronModel, budget: str, score: Score, latency: str | None, known: SubNetwork | None) -> Network:
    """The best sub-network with all layers alike: what a budget gets without a router.

    It is chosen on the text that it is evaluated on, which favours it: a router gains no less over it (ours).

    Args:
        model: the elastic network.
        budget: as a user writes it.
        score: the loss that it is chosen by.
        latency: as in `routed`.
        known: what was found before.

    Raises:
        ValueError: if the budget cannot be read or met.
    """
    limits = model.flextron.routing(latency).parse(budget)
    if all(limit.loose for limit in limits):
        best = model.backbone.space.full()
    else:
        best = known or best_uniform(model.backbone.space, limits, score).sub_network
    ratios = {limit.table.name: limit.table.ratio(best) for limit in limits}
    return Network(best, "the best uniform one, chosen on this text", ratios, budget, way=UNIFORM)


def in_order(model: FlextronModel, budgets: Sequence[str], answers: Sequence[Network]) -> list[Network]:
    """The full network, then the answers to each budget; those that are the full network too add nothing."""
    full = model.backbone.space.full()
    others = (each for budget in budgets for each in answers if each.budget == budget and each.selection != full)
    return [Network(full, "the full network", {}, way=FULL), *others]
