"""One evaluation: losses and scores of the full network and of what budgets get, each worked out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from flextron_lit.data.encoding import Ends
from flextron_lit.evaluation.loss_rows import Measurement, Row, measure
from flextron_lit.evaluation.networks import Network, Way, in_order, uniform
from flextron_lit.evaluation.results import Results
from flextron_lit.evaluation.task_rows import score
from flextron_lit.files.digest import fingerprint
from flextron_lit.files.ranks import tell
from flextron_lit.model import FlextronModel
from flextron_lit.space import SubNetwork
from flextron_lit.stages.validation import UNIFORM

if TYPE_CHECKING:
    # an optional extra
    from flextron_lit.evaluation.harness import LoadedTask

HARNESS = "lm_eval"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, and on what; what is in the results already is not evaluated again."""

    model: FlextronModel
    results: Results
    made: Row
    """How results are made, JSON-able."""
    budgets: Sequence[str]
    """As a user writes them."""
    ways: Sequence[Way]
    """How they are answered."""
    routed: Sequence[Network]
    """What routers answer."""
    latency: str | None
    """Name of the latency table that uniform networks go by, where there are several."""
    measurement: Measurement
    """Losses on the texts that there are, by which uniform networks are chosen too."""
    seed: int
    """Of intervals."""

    @cached_property
    def asked(self) -> Row:
        """What losses depend on beside how they are made."""
        return {
            "budgets": self.budgets,
            "networks": list(self.ways),
            "answers": [{**network.about(), "costs": dict(network.ratios)} for network in self.routed],
            "texts": {name: fingerprint(batches) for name, batches in self.measurement.texts.items()},
            "limits": self._limits(),
            "seed": self.seed,
        }

    def _limits(self) -> dict[str, dict[str, float]]:
        """What budgets mean to uniform networks, which are chosen by measuring."""
        if UNIFORM not in self.ways:
            return {}
        parse = self.model.flextron.routing(self.latency).parse
        return {budget: {each.table.name: each.value for each in parse(budget)} for budget in self.budgets}

    @cached_property
    def kept(self) -> list[Row] | None:
        """Rows of losses from an earlier run of the same; None if there are none."""
        return self.results.known_losses(self.made, self.asked)

    @cached_property
    def networks(self) -> list[Network]:
        """All networks, the best uniform ones measured unless an earlier run has."""
        answers = list(self.routed)
        rows = [row for row in self.kept or [] if row["network"] == UNIFORM]
        known = {row["budget"]: SubNetwork.from_json(row["sub_network"]) for row in rows}
        for budget in self.budgets if UNIFORM in self.ways else []:
            answers.append(uniform(self.model, budget, self.measurement.loss, self.latency, known.get(budget)))
        return in_order(self.model, self.budgets, answers)

    def losses(self) -> list[Row]:
        """Rows of losses, measured unless an earlier run has."""
        if self.kept is not None:
            tell(f"the losses are in {self.results.path} already; --fresh measures again")
            return self.kept
        rows = measure(self.measurement, self.networks, self.seed)
        self.results.losses = {"made": self.made, "asked": self.asked, "rows": rows}
        self.results.write()
        return rows

    def scores(self, tasks: Sequence[LoadedTask], limit: int | None, batch_size: int) -> list[Mapping[str, Any]]:
        """Rows of tasks, of which finished ones are not evaluated again.

        Args:
            tasks: with their data.
            limit: questions of each; None means all.
            batch_size: requests at once.
        """
        from flextron_lit.evaluation.harness import BudgetedLM

        lm = BudgetedLM(self.model, batch_size)
        versions = {**self.made["versions"], HARNESS: version(HARNESS)}
        made = {**self.made, "versions": versions, "batch_size": batch_size}
        if lm.ends.prefix or Ends.of(self.model.tokenizer).prefix:
            # results of before, when requests began as the tokenizer has it and texts did not, are no answer
            made["prefix"] = list(lm.ends.prefix)
        return [score(lm, task, network, limit, self.results, made) for task in tasks for network in self.networks]
