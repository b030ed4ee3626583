"""Tables in Markdown of the benchmarks that choose for every token, draft, and say how time grows; for `results.py`."""

from __future__ import annotations

from typing import Any

from results import measured_by, outside, own, read, table

ALL = "all domains"
DIMENSIONS = ("depth", "width", "length", "choices")


def dynamic_depth() -> dict[str, Any]:
    """By share of the FLOPs a table, the best first; beside them those that cannot run so."""
    found = read("dynamic_depth")
    rows = found.get("rows", {})
    if "original, 1.0" not in rows:
        return {}
    full = rows["original, 1.0"]["losses"]
    head = ["way", "FLOPs", "own domains", *outside(full), "trained tokens", "how"]
    targets: dict[str, list[list[str]]] = {}
    cannot: dict[str, str] = {}
    measured = {name: row for name, row in rows.items() if "losses" in row}
    for name, row in sorted(measured.items(), key=lambda each: own(each[1]["losses"])):
        way, _, target = name.rpartition(", ")
        if way != "original":
            targets.setdefault(target, []).append(depth_cells(way, row))
    for name, row in rows.items():
        if "losses" not in row:
            cannot[name.rpartition(", ")[0]] = row["about"]
    texts = {"own domains": own(full), **outside(full)}
    return {
        "targets": {target: table(head, targets[target]) for target in sorted(targets, reverse=True)},
        "original": ", ".join(f"{loss:.3f} ({name})" for name, loss in texts.items()),
        "cannot": [f"{way}: {why}" for way, why in cannot.items()],
        "about": measured_by(found),
    }


def depth_cells(way: str, row: dict[str, Any]) -> list[str]:
    """FLOPs are those of the own domains, each as long."""
    trained = row.get("trained")
    return [
        f"**{way}**" if way.startswith("Flextron") else way,
        f"{row['flops'][ALL]:.3f}",
        f"{own(row['losses']):.3f}",
        *(f"{loss:.3f}" for loss in outside(row["losses"]).values()),
        f"{trained['tokens']:,}" if trained else "",
        row.get("about", ""),
    ]


def speculative() -> dict[str, Any]:
    """Drafts, the fastest first, and the fastest again on more prompts."""
    found = read("speculative")
    rows = found.get("rows", {})
    if "fastest" not in rows:
        return {}
    head = [
        "draft",
        "parameters",
        "draft tokens",
        "confidence",
        "accepted",
        "tokens a pass",
        "speed-up",
        "range",
        "same",
    ]
    every = sorted(rows["all"].values(), key=lambda row: -row["speed_up"])
    return {
        "rows": table(head, map(draft_cells, every)),
        "fastest": table(head, map(draft_cells, rows["fastest"].values())),
        "about": measured_by(found),
    }


def draft_cells(row: dict[str, Any]) -> list[str]:
    low, high = row["range"]
    size = row["parameters"]
    return [
        row["draft"],
        "" if size is None else f"{size:.3f}",
        str(row["tokens"]),
        f"{row['confidence']:g}",
        f"{row['accepted']:.0%}",
        f"{row['tokens_a_pass']:.2f}",
        f"{row['speed_up']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{row['same']} of {row['texts']}",
    ]


def growth() -> dict[str, Any]:
    """Exponents, a row an operation and a column a dimension; and the times that they are of."""
    found = read("growth")
    rows = found.get("growth", {})
    if not rows:
        return {}
    operations = list(dict.fromkeys(name.rpartition(", ")[0] for name in rows))
    known = [dimension for dimension in DIMENSIONS if any(name.endswith(f", {dimension}") for name in rows)]
    sizes = {each: rows[next(n for n in rows if n.endswith(f", {each}"))]["sizes"] for each in known}
    head = ["what", *(f"{each} ({sizes[each][0]} to {sizes[each][-1]})" for each in known)]
    exponents = [[name, *(exponent(rows.get(f"{name}, {each}")) for each in known)] for name in operations]
    times = [[name, *(milliseconds(rows.get(f"{name}, {each}")) for each in known)] for name in operations]
    return {"exponents": table(head, exponents), "times": table(head, times), "about": measured_by(found)}


def exponent(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['exponent']:.2f}"


def milliseconds(row: dict[str, Any] | None) -> str:
    """Of the smallest and the largest size."""
    if row is None:
        return ""
    least, most = (1e3 * row["seconds"][place] for place in (0, -1))
    return f"{least:,.0f} to {most:,.0f} ms" if most > 100 else f"{least:.3g} to {most:.3g} ms"
