"""docs/results.md and its chart, from the JSON under benchmarks/results: `python benchmarks/results.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from above_chance import FULL
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from results_tasks import paper, tasks

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE, CHART = ROOT / "docs" / "results.md", ROOT / "docs" / "rivals.svg"
DOMAINS = ("speeches", "encyclopedia", "python_docs")
TARGETS = ("0.9", "0.8", "0.7", "0.6")
OURS, LAYERS, ALONE = "Flextron", "Flextron, whole layers", "one network alone"
NAMES = {"wikitext2_raw_test": "WikiText-2"}
HALF = "67M"
EVALUATIONS = 60
"""As `rival_families.py` has them."""
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


def svg(figure: Figure, path: Path) -> None:
    """Write a chart, the same bytes from the same measurements."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def own(losses: dict[str, float]) -> float:
    """Mean over the training domains' test documents."""
    return fmean(losses[name] for name in DOMAINS)


def wikitext(losses: dict[str, float]) -> float:
    return losses["wikitext2_raw_test"]


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
        f"**{way}**" if way in (OURS, LAYERS) else way,
        str(row["latency"].get("size", "")),
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
        "evaluations": EVALUATIONS,
        "ways": {name.rpartition(", ")[0] for name in rows},
        "targets": {target: table(head, cells) for target, cells in targets.items() if cells},
        "original": ", ".join(f"{loss:.3f} ({name})" for name, loss in texts.items()),
        "about": measured_by(found),
    }


def peers() -> dict[str, Any]:
    """Speed beside another elastic library."""
    found = read("peer_speed")
    if not found:
        return {}
    kinds = ("forward", "forward + backward", "one token")
    rows = [[name, *(f"{row[f'{kind}, of dense']:.3f}" for kind in kinds)] for name, row in found["times"].items()]
    return {"rows": table(["", *kinds], rows), "about": measured_by(found)}


def asked() -> dict[str, Any]:
    """Accuracy on tasks."""
    found = read("tasks")
    if not found:
        return {}
    budgets = [name for name in found["right"] if name[0].isdigit() and name != FULL]
    shown = {"rows": table(*tasks(found)), "budgets": " ".join(budgets), "about": measured_by(found)}
    return {"limit": found["limit"], "dtype": found["dtype"], **shown}


def paper_row() -> str:
    """Half of the parameters, as the paper has them."""
    found = read("tasks")
    return table(*paper(found, HALF)) if HALF in found.get("right", {}) else ""


def closed_form() -> str:
    """What reconstruction gives without training."""
    cells = [
        [name, *(f"{rows[each]['own']:.3f} ({rows[each]['wikitext2_raw_test']:.3f})" for each in NETWORKS)]
        for name, rows in sorted(read("reconstruction").items())
    ]
    return table(["way", *NETWORKS], cells) if cells else ""


def page() -> str:
    """Of all that was measured."""
    # they take their pieces from here
    import results_dynamic
    import results_quantization
    import results_runtimes
    import results_small

    settings = {"undefined": StrictUndefined, "keep_trailing_newline": True, "trim_blocks": True}
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), **settings).get_template("results.md.jinja")
    parts = {
        "tasks": asked(),
        "rivals": rivals(),
        "runtimes": results_runtimes.runtimes(),
        "quantization": results_quantization.quantization(),
        "closed_form": closed_form(),
        "peers": peers(),
        "depth": results_dynamic.dynamic_depth(),
        "speculative": results_dynamic.speculative(),
        "growth": results_dynamic.growth(),
        "ladder": results_small.ladder(),
        "ablations": results_small.ablations(),
        "paper": paper_row(),
    }
    return template.render(**parts, alone=ALONE)


def main() -> None:
    import results_quantization
    import results_runtimes

    PAGE.write_text(page(), encoding="utf-8")
    if results_runtimes.runtimes():
        results_runtimes.chart(CHART)
    if results_quantization.quantization():
        results_quantization.chart(ROOT / "docs" / "quantization.svg")


if __name__ == "__main__":
    main()
