"""What ours lose in the time that a rival takes, in two runtimes: a part of docs/results.md, and its chart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from results import LAYERS, OURS, measured_by, own, read, svg, table, wikitext

RUNTIMES = ("PyTorch", "llama.cpp")
LOSSES: dict[str, Callable[[dict[str, float]], float]] = {"own domains": own, "WikiText-2": wikitext}
TEXTS = {"own domains": "test documents of the three training domains", "WikiText-2": "WikiText-2, never trained on"}
COLOURS = {OURS: "black", LAYERS: "crimson"}
Points = list[tuple[float, float]]


def narrower(found: Mapping[str, Any], runtime: str, loss: Callable[[dict[str, float]], float]) -> Points:
    """Times and losses of the networks of the quickstart."""
    times = found[runtime]
    return [(times[name]["latency"], loss(row["losses"])) for name, row in found["rows"].items() if name in times]


def shorter(found: Mapping[str, Any], runtime: str, loss: Callable[[dict[str, float]], float]) -> Points:
    """Times and losses of those of fewer layers, whose shapes are those of rivals."""
    rows = (row for name, row in read("rivals")["rows"].items() if name.startswith(f"{LAYERS}, "))
    return [(found[runtime][f"depth {row['latency']['size']}"]["latency"], loss(row["losses"])) for row in rows]


OF_OURS = {OURS: narrower, LAYERS: shorter}


def curves(found: Mapping[str, Any], runtime: str, loss: Callable[[dict[str, float]], float]) -> dict[str, Points]:
    """Times and losses of our networks, the original behind them."""
    full = (1.0, loss(read("rivals")["rows"]["original"]["losses"]))
    every = {name: points(found, runtime, loss) for name, points in OF_OURS.items()}
    return {name: sorted([*points, full]) for name, points in every.items() if points}


def rivals(found: Mapping[str, Any], runtime: str) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Names, rows and times of what was pruned to a size and tuned."""
    for name, row in read("rivals")["rows"].items():
        if "size" in row:
            shape = next(each for each in (f"depth {row['size']}", f"mlp {row['size']}") if each in found[runtime])
            yield name, row, found[runtime][shape]["latency"]


def compared(found: Mapping[str, Any], runtime: str) -> str:
    """A row a rival, the slowest first."""
    ours = {text: curves(found, runtime, loss) for text, loss in LOSSES.items()}
    head = ["way", "left", "time", *(name for text, of_ours in ours.items() for name in (text, *of_ours))]
    rows = []
    for name, row, time in sorted(rivals(found, runtime), key=lambda each: (-each[2], own(each[1]["losses"]))):
        cells = [name.rpartition(", ")[0], str(row["size"]), f"{time:.3f}"]
        for text, loss in LOSSES.items():
            cells += best_in_bold([loss(row["losses"]), *(read_off(each, time) for each in ours[text].values())])
        rows.append(cells)
    return table(head, rows)


def read_off(points: Points, time: float) -> float:
    """The loss between two networks; of none that takes so little time, NaN."""
    times, losses = zip(*points, strict=True)
    return float(np.interp(time, times, losses, left=np.nan))


def best_in_bold(losses: Sequence[float]) -> list[str]:
    shown = ["" if np.isnan(loss) else f"{loss:.3f}" for loss in losses]
    best = f"{np.nanmin(losses):.3f}"
    return [f"**{loss}**" if loss == best else loss for loss in shown]


def runtimes() -> dict[str, Any]:
    """Tables by runtime; empty where unmeasured."""
    found = read("runtimes")
    if not set(RUNTIMES) <= found.keys():
        return {}
    return {"tables": {runtime: compared(found, runtime) for runtime in RUNTIMES}, "about": measured_by(found)}


def lines(runtime: str, loss: Callable[[dict[str, float]], float]) -> dict[str, Points]:
    """Times and losses by way, ours the first."""
    found, full = read("runtimes"), loss(read("rivals")["rows"]["original"]["losses"])
    points = curves(found, runtime, loss)
    for name, row, time in rivals(found, runtime):
        points.setdefault(name.rpartition(", ")[0], [(1.0, full)]).append((time, loss(row["losses"])))
    return {way: sorted(each) for way, each in points.items()}


def chart(path: Path) -> None:
    """Loss against measured time, every way a line; a column a runtime, a row a text."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels = figure.subplots(len(LOSSES), len(RUNTIMES), sharex="col", sharey="row")
    for axes, ((text, loss), runtime) in zip(panels.flat, product(LOSSES.items(), RUNTIMES), strict=True):
        for way, points in lines(runtime, loss).items():
            mine = way in COLOURS
            style = {"linewidth": 3.5, "zorder": 3, "color": COLOURS[way]} if mine else {"linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), "-" if mine else "--", marker="o", markersize=4, label=way, **style)
        axes.set(title=f"{runtime}: {TEXTS[text]}", ylabel="nats per token")
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.invert_xaxis()
        axes.set_xlabel("measured time of a request, share of the original's")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=4)
    svg(figure, path)
