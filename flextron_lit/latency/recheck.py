"""Measures a few fresh networks beside the full one, to see whether a latency table still holds."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import nan

from flextron_lit.costs.workload import Phase
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.elastic.selection import Selection
from flextron_lit.latency.block_times import spread_over_cost
from flextron_lit.latency.drift import Drift, Fresh
from flextron_lit.latency.latency_table import HeldOut, LatencyTable
from flextron_lit.latency.miss import PROMISED
from flextron_lit.latency.request import REQUEST, measure_request
from flextron_lit.latency.routed_times import expected_ratio, held_out_numbers, policies_of

NETWORKS = 4
SEED = 1_000
"""Another than that of the networks that a table is checked on when it is made."""
ENOUGH = 0.01
"""Spread of a ratio that decides."""


@dataclass(frozen=True)
class Rechecked:
    """What came of it."""

    table: LatencyTable
    """The same costs, with what was measured now beside what was held out; as it was, if noise hides what it is."""
    drifts: Mapping[str, Drift]
    """By the latency: `prefill`, `decode`, `latency`."""
    pace: float
    """Time that the full network takes now for the request, relative to when the table was made."""

    @property
    def holds(self) -> bool:
        """Whether every latency does."""
        return all(drift.holds for drift in self.drifts.values())

    @property
    def sure(self) -> bool:
        """Whether the noise of measuring is below what is promised."""
        return all(drift.spread <= PROMISED for drift in self.drifts.values())

    def told(self) -> str:
        """In words: of the latency that is furthest off."""
        name, drift = max(self.drifts.items(), key=lambda item: (not item[1].holds, item[1].largest))
        holds = "still holds" if self.sure else "still holds, as far as so much noise tells"
        verdict = holds if self.holds else "holds no more"
        return f"{verdict}: in {name} {drift.told()}; the full network takes {self.pace:.2f} times as long as then"


def recheck(
    backbone: ElasticBackbone, known: LatencyTable, *, budget_seconds: float = 10.0, networks: int = NETWORKS
) -> Rechecked:
    """Measure fresh sub-networks, or mixtures for the table of a dynamic router, and compare them with the table.

    Args:
        backbone: the elastic network, on the device and in the type that the table was measured on; values do not
            matter.
        known: the table.
        budget_seconds: time for it; a few rounds are measured however long they take.
        networks: how many, at least 1, spread evenly over cost.

    Raises:
        ValueError: if the workload does not fit in memory.
    """
    fresh = {phase: _fresh(backbone, known, phase, networks) for phase in known.phases}
    title = "checking again"

    def chosen(phase: Phase) -> dict[int, Selection]:
        return dict(enumerate(selection for selection, _ in fresh[phase]))

    found = measure_request(backbone, known.workload, chosen, budget_seconds, title=title, until=ENOUGH)
    rows = {
        phase: tuple(
            replace(row, measured=found.phases[phase].ratios[index].value) for index, (_, row) in enumerate(of_phase)
        )
        for phase, of_phase in fresh.items()
    }
    times = {phase: each.table.full for phase, each in known.phases.items()}
    predicted: dict[str, list[float]] = {phase: [row.predicted for row in each] for phase, each in rows.items()}
    predicted[REQUEST] = [
        known.workload.of_request(times, {phase: each[index].predicted for phase, each in rows.items()})
        for index in range(networks)
    ]
    said = known.may_miss
    drifts = {
        name: Drift([Fresh(predicted[name][i], r.value, r.spread) for i, r in ratios.items()], said.get(name, 0.0))
        for name, ratios in found.ratios.items()
    }
    checked = Rechecked(known, drifts, 1e3 * found.full / known.tables()[REQUEST].full)
    if not checked.sure:
        return checked
    phases = {phase: replace(each, rechecked=rows[phase]) for phase, each in known.phases.items()}
    return replace(checked, table=replace(known, phases=phases))


def _fresh(
    backbone: ElasticBackbone, known: LatencyTable, phase: Phase, networks: int
) -> list[tuple[Selection, HeldOut]]:
    """What to measure in a phase, with what its table says of it; what is measured is to come."""
    table = known.phases[phase].table
    if known.execution == "dynamic":
        policies = policies_of(backbone, known.workload, phase, held_out_numbers(networks, SEED))
        return [(each, HeldOut((), expected_ratio(table, each), nan, number)) for number, each in policies.items()]
    chosen = spread_over_cost(backbone.space, known.tables()[REQUEST], networks, SEED)
    return [(each, HeldOut(each.choices, table.ratio(each), nan)) for each in chosen]
