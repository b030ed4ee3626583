"""The budgets that a server answers within: each a model of its own to its clients, `NAME@0.8`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flextron_lit.costs import COUNTED, Workload
from flextron_lit.generation.call import chosen
from flextron_lit.model import FlextronModel
from flextron_lit.serving.refusal import RequestError
from flextron_lit.space import SubNetwork

SEPARATOR = "@"


@dataclass(frozen=True)
class Offered:
    """A budget and what it gets."""

    budget: str
    """As the operator wrote it."""
    sub_network: SubNetwork
    how: str
    size: float
    """Its parameters, as a share of the full network's: what is smaller than what goes by this."""


@dataclass(frozen=True)
class Offer:
    """All of them, under one name."""

    name: str
    budgets: tuple[Offered, ...]
    """The largest first, which is what the bare name gets."""

    def model(self, offered: Offered) -> str:
        """What clients call a budget."""
        return f"{self.name}{SEPARATOR}{offered.budget}"

    def find(self, budget: str) -> Offered | None:
        """The budget that is written so, or is the same number."""
        return next((each for each in self.budgets if same(each.budget, budget)), None)

    def named(self, model: str, budget: str | None) -> Offered:
        """What a request means.

        Args:
            model: `NAME`, `NAME@BUDGET`, or nothing.
            budget: in the place of the name's.

        Raises:
            RequestError: if there is no such model, or the budget is not among those offered.
        """
        name, apart, of_name = model.partition(SEPARATOR)
        found = self.find(of_name) if apart else self.budgets[0]
        if (name not in ("", self.name)) or found is None:
            known = ", ".join(map(self.model, self.budgets))
            raise RequestError(
                404, f"there is no model {model!r}; there are {known}", code="model_not_found", param="model"
            )
        return found if budget is None else self.limited(budget, "budget")

    def limited(self, budget: str, field: str) -> Offered:
        """The budget that a field of a request names.

        Raises:
            RequestError: if it is not among those offered.
        """
        found = self.find(budget)
        if found is None:
            known = ", ".join(each.budget for each in self.budgets)
            raise RequestError(400, f"the {field} {budget!r} is not offered here; there are {known}", param=field)
        return found

    def listed(self, created: int) -> dict[str, Any]:
        """What `/v1/models` says."""
        names = [self.name, *map(self.model, self.budgets)]
        return {"object": "list", "data": [self.row(name, created) for name in names]}

    def row(self, name: str, created: int) -> dict[str, Any]:
        """What it says of one model.

        Args:
            name: of the model.
            created: when the server began, in seconds since 1970.

        Raises:
            RequestError: if there is no such model.
        """
        offered = self.named(name, None)
        told = {"budget": offered.budget, "how": offered.how, "parameters": round(offered.size, 4)}
        return {"id": name, "object": "model", "created": created, "owned_by": "flextron-lit", **told}


def same(one: str, other: str) -> bool:
    """Whether two budgets are written alike, or are the same number."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def offer(model: FlextronModel, name: str, budgets: Sequence[str], latency: str | None) -> Offer:
    """What a network answers to budgets.

    Args:
        model: the network.
        name: what clients call it.
        budgets: as on the command line, each once.
        latency: name of the latency table to use.

    Raises:
        ValueError: if a budget cannot be read or met, stands there twice, or could not be part of a name.
    """
    for place, budget in enumerate(budgets):
        twice = next((each for each in budgets[:place] if same(each, budget)), None)
        if twice is not None:
            raise ValueError(f"--budgets names {twice} twice; once is enough")
    sizes = COUNTED["parameters"](model.backbone, Workload())
    found = []
    for budget in budgets:
        choice = chosen(model, budget, dynamic=False, latency=latency)
        assert isinstance(choice.selection, SubNetwork)
        found.append(Offered(budget, choice.selection, choice.how, sizes.ratio(choice.selection)))
    return Offer(name, tuple(sorted(found, key=lambda each: -each.size)))
