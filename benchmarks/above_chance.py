"""The share of a full network's accuracy above chance that another network keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

CHANCE = {
    "offline_arc_easy": 0.25,
    "offline_piqa": 0.5,
    "offline_hellaswag": 0.25,
    "offline_lambada": 0.0,
    "offline_winogrande": 0.5,
    "offline_mmlu": 0.25,
}
DRAWN = 10_000
FULL = "1.0"
Answered = tuple[np.ndarray, np.ndarray, float]
"""What a network answered right, what the full network did, [questions] each, and chance."""


def share(small: np.ndarray, full: np.ndarray, chance: float) -> float:
    """Of the accuracy above chance; not a number where the full network is at chance."""
    above = full.mean() - chance
    return float((small.mean() - chance) / above) if above else np.nan


def interval(answered: Sequence[Answered], generator: np.random.Generator) -> tuple[float, float]:
    """Of the mean share over tasks, 95 %; draws of few questions in which the full network is at chance say nothing."""
    drawn = []
    for _ in range(DRAWN):
        picks = [generator.integers(0, len(full), len(full)) for _, full, _ in answered]
        drawn.append(fmean(share(s[p], f[p], c) for (s, f, c), p in zip(answered, picks, strict=True)))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def digits(right: str) -> np.ndarray:
    return np.array([float(digit) for digit in right])


def pairs(right: Mapping[str, Mapping[str, str]], name: str, tasks: Iterable[str]) -> list[Answered]:
    """Of a network, by task; `right` has a digit a question."""
    return [(digits(right[name][task]), digits(right[FULL][task]), CHANCE[task]) for task in tasks]
