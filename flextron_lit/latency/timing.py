"""Times relative to a reference that is measured all along, so that the machine's drift cancels (ours)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, sqrt
from statistics import median
from typing import Any, Generic, TypeVar

import torch
from torch.utils.benchmark.utils.timer import timer

Run = Callable[[], Any]
Name = TypeVar("Name")
Result = TypeVar("Result")
ROUNDS_OF_A_SPREAD = 6
"""Fewer have no interval that holds the median in 95 of 100 cases."""


@dataclass(frozen=True)
class Ratio:
    """A time relative to the reference's."""

    value: float
    """Median over rounds."""
    spread: float
    """Half the width of the interval that holds the true median in at least 95 of 100 cases."""


@dataclass(frozen=True)
class Interleaved(Generic[Name]):
    """What `interleaved` found."""

    ratios: dict[Name, Ratio]
    reference: float
    """Median of the reference, in seconds."""


def seconds(run: Run, device: torch.device) -> float:
    """Time of one run: CUDA events around it on a GPU, else torch's benchmark clock, which waits for accelerators."""
    return timed(run, device)[1]


def timed(run: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """What a run returns, and its time as `seconds` takes it."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        found = run()
        end.record()
        end.synchronize()
        return found, float(start.elapsed_time(end)) / 1e3
    begun = timer()
    found = run()
    return found, timer() - begun


def median_with_spread(values: Sequence[float], independent: int | None = None) -> Ratio:
    """Median, and half its 95 % interval from order statistics: no assumption on how times are distributed.

    Args:
        values: at least one.
        independent: how many of them say something of their own; None means all.
    """
    ordered = sorted(values)
    count = independent or len(ordered)
    middle, reach = (len(ordered) - 1) / 2, 0.98 * sqrt(count) * len(ordered) / count
    low, high = max(0, floor(middle - reach)), min(len(ordered) - 1, ceil(middle + reach))
    return Ratio(median(ordered), (ordered[high] - ordered[low]) / 2)


def _settled(found: Iterable[Sequence[float]], until: float) -> bool:
    return all(_ratio(values).spread <= until for values in found)


def _ratio(values: Sequence[float]) -> Ratio:
    """Of two to each run."""
    return median_with_spread(values, len(values) // 2)


def interleaved(
    runs: Mapping[Name, Run],
    reference: Run,
    rounds: Iterable[int],
    clock: Callable[[Run], float],
    until: float | None = None,
) -> Interleaved[Name]:
    """Time every run once a round, each between two runs of the reference, in an order that turns from round to round.

    A machine warms up, throttles and serves others meanwhile, so times of different minutes do not compare. The
    reference just before a run and the one just after have the speed that the run had, on average, as far as that
    changes evenly. A run is related to each of them and not to their mean, which either's interruption would spoil: as
    long as fewer than half of the ratios are hit, the median passes over them. And since the order turns, a speed that
    rises and falls within a round favours no run.

    Args:
        runs: what to time, by name.
        reference: what to relate it to.
        rounds: counts from 0.
        clock: times one run, in seconds.
        until: ends before all rounds are over as soon as every ratio has at most this spread; None runs them all.
    """
    names = list(runs)
    found: dict[Name, list[float]] = {name: [] for name in names}
    references = []
    for turn in rounds:
        before = clock(reference)
        references.append(before)
        shift = turn % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            time, after = clock(runs[name]), clock(reference)
            found[name] += [time / before, time / after]
            references.append(after)
            before = after
        if until is not None and turn + 1 >= ROUNDS_OF_A_SPREAD and _settled(found.values(), until):
            break
    return Interleaved({name: _ratio(values) for name, values in found.items()}, median(references))
