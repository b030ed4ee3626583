"""What ours lose in the time that a rival takes, in two runtimes: a part of docs/results.md, and its chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from results import OURS, measured_by, own, read, svg, table, wikitext

RUNTIMES = ("PyTorch", "llama.cpp")
LOSSES: dict[str, Callable[[dict[str, float]], float]] = {"own domains": own, "WikiText-2": wikitext}
TEXTS = {"own domains": "test documents of the three training domains", "WikiText-2": "WikiText-2, never trained on"}
Points = list[tuple[float, float]]


def ours(found: Mapping[str, Any], runtime: str, loss: Callable[[dict[str, float]], float]) -> Points:
    """Times and losses of our networks, the full one among them."""
    times = found[runtime]
    points = [(times[name]["latency"], loss(row["losses"])) for name, row in found["rows"].items() if name in times]
    return sorted([*points, (1.0, loss(read("rivals")["rows"]["original"]["losses"]))])


def rivals(found: Mapping[str, Any], runtime: str) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Names, rows and times of what was pruned to a size and tuned."""
    for name, row in read("rivals")["rows"].items():
        if "size" in row:
            shape = next(each for each in (f"depth {row['size']}", f"mlp {row['size']}") if each in found[runtime])
            yield name, row, found[runtime][shape]["latency"]


def compared(found: Mapping[str, Any], runtime: str) -> str:
    """A row a rival, the slowest first."""
    head = ["way", "left", "time", *(f"{who}{text}" for text in LOSSES for who in ("", "ours, "))]
    curves = {text: list(zip(*ours(found, runtime, loss), strict=True)) for text, loss in LOSSES.items()}
    rows = []
    for name, row, time in sorted(rivals(found, runtime), key=lambda each: (-each[2], own(each[1]["losses"]))):
        cells = [name.rpartition(", ")[0], str(row["size"]), f"{time:.3f}"]
        for text, loss in LOSSES.items():
            times, losses = curves[text]
            theirs, mine = loss(row["losses"]), float(np.interp(time, times, losses))
            known = times[0] <= time
            cells += [bold(theirs, known and theirs < mine), bold(mine, mine < theirs) if known else ""]
        rows.append(cells)
    return table(head, rows)


def bold(loss: float, best: bool) -> str:
    return f"**{loss:.3f}**" if best else f"{loss:.3f}"


def runtimes() -> dict[str, Any]:
    """Tables by runtime; empty where unmeasured."""
    found = read("runtimes")
    if not set(RUNTIMES) <= found.keys():
        return {}
    return {"tables": {runtime: compared(found, runtime) for runtime in RUNTIMES}, "about": measured_by(found)}


def lines(runtime: str, loss: Callable[[dict[str, float]], float]) -> dict[str, Points]:
    """Times and losses by way, ours the first."""
    found, full = read("runtimes"), loss(read("rivals")["rows"]["original"]["losses"])
    points = {OURS: ours(found, runtime, loss)}
    for name, row, time in rivals(found, runtime):
        points.setdefault(name.rpartition(", ")[0], [(1.0, full)]).append((time, loss(row["losses"])))
    return {way: sorted(each) for way, each in points.items()}


def chart(path: Path) -> None:
    """Loss against measured time, every way a line; a column a runtime, a row a text."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(len(LOSSES), len(RUNTIMES), sharex="col", sharey="row")
    for axes, ((text, loss), runtime) in zip(panels.flat, product(LOSSES.items(), RUNTIMES), strict=True):
        for way, points in lines(runtime, loss).items():
            mine = way == OURS
            style: dict[str, Any] = {"linewidth": 3.5, "zorder": 3, "color": "black"} if mine else {"linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), "-" if mine else "--", marker="o", markersize=4, label=way, **style)
        axes.set(title=f"{runtime}: {TEXTS[text]}", ylabel="nats per token")
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.invert_xaxis()
        axes.set_xlabel("measured time of a request, share of the original's")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    svg(figure, path)
