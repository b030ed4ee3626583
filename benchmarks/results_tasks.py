"""Tables of accuracy: what is kept above chance, and the paper's own row beside it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from above_chance import FULL, Answered, interval, pairs, share

TASKS = {
    "offline_arc_easy": "ARC-Easy",
    "offline_piqa": "PIQA",
    "offline_hellaswag": "HellaSwag",
    "offline_lambada": "LAMBADA",
    "offline_winogrande": "WinoGrande",
    "offline_mmlu": "MMLU",
}
KEPT = ("offline_arc_easy", "offline_piqa", "offline_hellaswag", "offline_lambada")
"""In which a model of 135M parameters is above chance."""
PAPER = {"PIQA": (0.87, 74.10), "WinoGrande": (0.50, 62.00), "ARC-Easy": (0.81, 66.50), "HellaSwag": (0.81, 68.50)}
"""Share kept and accuracy of Flextron-Llama-2-7B at 3.4B, as TraceNAS (arXiv 2602.02891, table 2) quotes them."""
SHEARED = {"PIQA": 75.80, "WinoGrande": 64.20, "ARC-Easy": 67.00, "HellaSwag": 70.80}
"""Sheared-LLaMA 2.7B, from the same table."""
Rows = list[list[str]]


def accuracy(right: str) -> str:
    """With its standard error."""
    mean = fmean(map(int, right))
    return f"{mean:.3f} ± {(mean * (1 - mean) / len(right)) ** 0.5:.3f}"


def mean_share(answered: Sequence[Answered]) -> str:
    low, high = interval(answered, np.random.default_rng(0))
    return f"{fmean(share(*each) for each in answered):.0%} ({low:.0%} to {high:.0%})"


def tasks(found: dict[str, Any]) -> tuple[list[str], Rows]:
    """Accuracies by network, and the mean share kept on the tasks that say something."""
    right = found["right"]
    head = ["network", *TASKS.values(), "kept of four tasks"]
    rows = []
    for name, mine in right.items():
        asked = [accuracy(mine[task]) if task in mine else "" for task in TASKS]
        kept = "" if name == FULL or not set(KEPT) <= mine.keys() else mean_share(pairs(right, name, KEPT))
        rows.append([name, *asked, kept])
    return head, rows


def paper(found: dict[str, Any], half: str) -> tuple[list[str], Rows]:
    """Share kept at half of the parameters, here and in the paper."""
    names = {shown: task for task, shown in TASKS.items()}
    kept = pairs(found["right"], half, [names[shown] for shown in PAPER])
    rows = [
        ["Flextron-Llama-2-7B at 3.4B: accuracy", *(f"{quoted:.2f}" for _, quoted in PAPER.values())],
        ["share kept of Llama-2-7B's above chance", *(f"{share_:.0%}" for share_, _ in PAPER.values())],
        ["Sheared-LLaMA 2.7B: accuracy", *(f"{quoted:.2f}" for quoted in SHEARED.values())],
        [f"here, {half}: accuracy", *(f"{100 * small.mean():.2f}" for small, _, _ in kept)],
        ["share kept of SmolLM2-135M's above chance", *(f"{share(*each):.0%}" for each in kept)],
    ]
    return ["", *PAPER], rows
