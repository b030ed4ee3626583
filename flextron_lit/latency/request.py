"""From the passes of a request to the whole of it: measured in each, relative to the full network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from flextron_lit.costs.workload import Phase, Workload
from flextron_lit.elastic.backbone import ElasticBackbone
from flextron_lit.elastic.selection import Selection
from flextron_lit.latency.block_times import measure, phase_seconds
from flextron_lit.latency.timing import Interleaved, Ratio

Name = TypeVar("Name")
REQUEST = "latency"
"""Name of the whole request's latency; those of its passes have the names of the phases."""


@dataclass(frozen=True)
class Measured(Generic[Name]):
    """What one measurement of all phases found."""

    workload: Workload
    phases: Mapping[Phase, Interleaved[Name]]

    @property
    def full(self) -> float:
        """Time of the full network for the request, in seconds."""
        return sum(count * self.phases[phase].reference for phase, count in self.workload.phases.items())

    @property
    def ratios(self) -> dict[str, dict[Name, Ratio]]:
        """Every latency by its name: of what was measured the time relative to the full network's."""
        times = {phase: found.reference for phase, found in self.phases.items()}
        names = next(iter(self.phases.values())).ratios

        def whole(name: Name) -> Ratio:
            ratios = {phase: found.ratios[name] for phase, found in self.phases.items()}
            value = self.workload.of_request(times, {phase: ratio.value for phase, ratio in ratios.items()})
            # noise of both passes may go the same way
            spread = self.workload.of_request(times, {phase: ratio.spread for phase, ratio in ratios.items()})
            return Ratio(value, spread)

        by_phase = {str(phase): found.ratios for phase, found in self.phases.items()}
        return {**by_phase, REQUEST: {name: whole(name) for name in names}}


def measure_request(
    backbone: ElasticBackbone,
    workload: Workload,
    chosen: Callable[[Phase], Mapping[Name, Selection]],
    budget_seconds: float,
    text: Tensor | None = None,
    title: str = "measuring",
    until: float | None = None,
) -> Measured[Name]:
    """`measure` in every phase of a workload, the time shared out among them.

    Args:
        backbone: as of `measure`, as are the others.
        workload: likewise.
        chosen: what to time in a phase, by name: the same names in each.
        budget_seconds: for all phases.
        text: likewise.
        title: likewise.
        until: likewise.

    Raises:
        ValueError: likewise.
    """
    return Measured(
        workload,
        {
            phase: measure(
                backbone, workload, phase, chosen(phase), phase_seconds(phase, budget_seconds), text, title, until
            )
            for phase in workload.phases
        },
    )
