"""Files of llama.cpp: the part of docs/results.md on quantisation, and its chart."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from results import measured_by, read, svg, table

WANTED = {"mb": "MB on disk", "prompt": "prompt, times as fast", "predicted": "answer, times as fast"}
"""Of the full network in F16."""


def best_for(row: dict[str, float], others: Iterable[dict[str, float]]) -> str:
    """In what no other network is better without losing more."""
    wanted = {
        "size": lambda each: -each["mb"],
        "prompt": lambda each: each["prompt"],
        "answer": lambda each: each["predicted"],
    }
    lost = [each for each in others if each["loss"] <= row["loss"] and each is not row]
    return ", ".join(name for name, good in wanted.items() if all(good(each) < good(row) for each in lost))


def quantization() -> dict[str, Any]:
    """Files of llama.cpp, the smallest first."""
    found = read("quantization")
    if not found:
        return {}
    rows = sorted(found["rows"].items(), key=lambda each: each[1]["mb"])
    cells = [
        [
            name,
            f"{row['mb']:.0f}",
            f"{row['memory_mb']:.0f}",
            f"{row['prompt']:.2f}",
            f"{row['predicted']:.2f}",
            f"{row['loss']:.3f}",
            best_for(row, found["rows"].values()),
        ]
        for name, row in rows
    ]
    head = ["network", "MB", "memory MB", "prompt", "answer", "nats", "best at its loss for"]
    return {"rows": table(head, cells), "about": measured_by(found)}


def chart(path: Path) -> None:
    """Loss against size and speeds; a line a kind of numbers, along the networks."""
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, row in read("quantization")["rows"].items():
        kinds.setdefault(name.partition(" ")[2], []).append(row)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(WANTED), sharey=True)
    for axes, (what, title) in zip(panels, WANTED.items(), strict=True):
        for kind, rows in kinds.items():
            axes.plot([row[what] for row in rows], [row["loss"] for row in rows], "-o", markersize=4, label=kind)
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("nats per token, WikiText-2")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    svg(figure, path)
