"""docs/results.md and its chart, from the JSON under benchmarks/results: `python benchmarks/results.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, CHART = ROOT / "docs" / "results.md", ROOT / "docs" / "rivals.svg"
DOMAINS = ("speeches", "encyclopedia", "python_docs")
TARGETS = ("0.9", "0.8", "0.7", "0.6")
OURS, ALONE = "Flextron", "one network alone"
NAMES = {"wikitext2_raw_test": "WikiText-2"}
NETWORKS = ("116.5M", "97.5M", "81M", "64.5M")
"""Of the table of closed forms."""


def read(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_by(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["about"]["versions"].items())
    return f"Measured on {found['about']['machine']}, one thread; {versions}."


def own(losses: dict[str, float]) -> float:
    """Mean over the training domains' test documents."""
    return fmean(losses[name] for name in DOMAINS)


def outside(losses: dict[str, float]) -> dict[str, float]:
    """By the name that readers know."""
    return {NAMES.get(name, name): loss for name, loss in losses.items() if name not in DOMAINS}


def ways_at(rows: dict[str, Any], target: str) -> dict[str, Any]:
    """Rows of a target by way, the best first."""
    found = {name.rpartition(", ")[0]: row for name, row in rows.items() if name.endswith(f", {target}")}
    return dict(sorted(found.items(), key=lambda each: own(each[1]["losses"])))


def way_cells(way: str, row: dict[str, Any]) -> list[str]:
    before = row.get("before tuning")
    return [
        f"**{way}**" if way == OURS else way,
        str(row.get("size", "")),
        f"{row['latency']['latency']:.3f}",
        f"{row['parameters'] / 1e6:.1f}M",
        f"{own(row['losses']):.3f}",
        *(f"{loss:.3f}" for loss in outside(row["losses"]).values()),
        "" if before is None else f"{own(before):.3f}",
    ]


def rivals() -> dict[str, Any]:
    found = read("rivals")
    rows = found.get("rows", {})
    tuned = [row["tuning"] for row in rows.values() if "tuning" in row]
    if not tuned:
        return {}
    full = rows["original"]["losses"]
    head = ["way", "left", "latency", "parameters", "own domains", *outside(full), "before tuning"]
    targets = {target: [way_cells(*each) for each in ways_at(rows, target).items()] for target in TARGETS}
    texts = {"own domains": own(full), **outside(full)}
    return {
        "tuning": tuned[0],
        "targets": {target: table(head, cells) for target, cells in targets.items() if cells},
        "original": ", ".join(f"{loss:.3f} ({name})" for name, loss in texts.items()),
        "about": measured_by(found),
    }


def quantization() -> dict[str, Any]:
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
        ]
        for name, row in rows
    ]
    head = ["network", "MB", "memory MB", "prompt", "answer", "nats"]
    return {"rows": table(head, cells), "about": measured_by(found)}


def closed_form() -> str:
    """What reconstruction gives without training."""
    cells = [
        [name, *(f"{rows[each]['own']:.3f} ({rows[each]['wikitext2_raw_test']:.3f})" for each in NETWORKS)]
        for name, rows in sorted(read("reconstruction").items())
    ]
    return table(["way", *NETWORKS], cells) if cells else ""


def page() -> str:
    """Of all that was measured."""
    settings = {"undefined": StrictUndefined, "keep_trailing_newline": True, "trim_blocks": True}
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), **settings).get_template("results.md.jinja")
    parts = {"rivals": rivals(), "quantization": quantization(), "closed_form": closed_form()}
    return template.render(**parts, alone=ALONE)


def chart(path: Path) -> None:
    """Loss against measured latency, every way a line."""
    from matplotlib.figure import Figure

    rows = read("rivals")["rows"]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, row in rows.items():
        if name != "original":
            start = [(1.0, own(rows["original"]["losses"]))]
            points = lines.setdefault(name.rpartition(", ")[0], start)
            points.append((row["latency"]["latency"], own(row["losses"])))
    for way, points in lines.items():
        bold = way == OURS
        latencies, losses = zip(*sorted(points, reverse=True), strict=True)
        axes.plot(latencies, losses, marker="o", label=way, linewidth=3 if bold else 1.2, zorder=3 if bold else 2)
    axes.invert_xaxis()
    axes.set_xlabel("measured latency, share of the original's")
    axes.set_ylabel("nats per token (held-out, three domains)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    if rivals():
        chart(CHART)


if __name__ == "__main__":
    main()
