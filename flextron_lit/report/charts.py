"""The charts of the report as Vega-Lite specifications; `report.js` feeds them, and colours are those of `report.css`.

Vega draws SVG, says what it shows to screen readers, and is small enough (0.9 MB) to be part of every page (ours).
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import vl_convert

from flextron_lit.costs import CostTable, Workload
from flextron_lit.latency.latency_table import LatencyTable

SHAPES = {"full": "diamond", "static": "circle", "dynamic": "triangle-up", "uniform": "square", "random": "cross"}
"""Of the points, by kind: colour is not needed to tell them apart."""
NOUNS = {
    "latency": "latency of a request",
    "parameters": "parameters",
    "flops": "FLOPs of a request",
    "kv_bytes": "KV cache (bytes)",
}
"""What costs are called; the others by their own names."""
LICENCE = "Vega, Vega-Lite, Vega-Embed: (c) University of Washington Interactive Data Lab, BSD 3-Clause licence"
Spec = dict[str, Any]


@cache
def library() -> str:
    """Vega as JavaScript that needs nothing else, safe inside a `script` element."""
    code: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return f"/* {LICENCE} */\n" + code.replace("</script", r"<\/script")


def noun(name: str) -> str:
    """What to call a cost."""
    return NOUNS.get(name, name.replace("_", " "))


def axis_title(table: CostTable) -> str:
    """Of a cost, with its unit where that is not said already."""
    return noun(table.name) + (" (ms)" if table.unit == "ms" else "")


def request(measured: LatencyTable | None) -> str:
    """The request that costs are those of, in words, and where latencies were measured."""
    workload = measured.workload if measured else Workload()
    shape = f"{workload.batch_size} × ({workload.prompt_tokens} + {workload.generated_tokens} tokens)"
    said = f"Costs are those of a request of {shape}, prompt and generated, in {workload.dtype}"
    return f"{said}; latency on {measured.conditions['device']['name']}." if measured else f"{said}."


def trade_off(table: CostTable, kinds: Sequence[str]) -> Spec:
    """How good networks are against one cost: points with intervals, the ladder as a line, the chosen rung as a ring.

    `report.js` gives the other axis its title, and leaves out layers without data: `rungs`, `intervals`, `points`,
    `chosen`.

    Args:
        table: the cost.
        kinds: kinds of point that there are, in the order of the legend.
    """
    cost = {"field": f"costs.{table.name}", "type": "quantitative"}
    axis = {"format": ",.6~g" if table.unit == "ms" else ".3~s", "tickCount": 6, "labelOverlap": True}
    scale = {"zero": False, "padding": 16}
    x = {**cost, "title": axis_title(table), "scale": scale, "axis": axis}
    y = {"type": "quantitative", "scale": scale, "axis": {"tickCount": 8}}
    place, rung = ({"x": x, "y": {**y, "field": field}} for field in ("value", "loss"))
    ring = {"type": "point", "size": 420, "stroke": "var(--ink)", "strokeWidth": 2, "filled": False, "opacity": 1}
    return {
        "description": f"Quality against {noun(table.name)}. The tables below have the same numbers.",
        "width": "container",
        "height": 380,
        "layer": [
            {
                "name": "ladder",
                "data": {"name": "rungs"},
                "mark": {"type": "line", "stroke": "var(--static)", "strokeWidth": 1.5, "opacity": 0.7, "aria": False},
                "encoding": {**rung, "order": cost},
            },
            {
                "name": "intervals",
                "data": {"name": "intervals"},
                "mark": {"type": "rule", "stroke": "var(--faint)", "aria": False},
                "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}},
            },
            {
                "name": "points",
                "data": {"name": "points"},
                "mark": {"type": "point", "filled": True, "size": 110},
                "encoding": {**place, **_by_kind(kinds), "tooltip": _said_of_points(table)},
            },
            {"name": "ring", "data": {"name": "chosen"}, "mark": ring, "encoding": rung},
        ],
        "config": _read("look"),
    }


def _by_kind(kinds: Sequence[str]) -> Spec:
    """What tells kinds of point apart, and points of earlier weights from the others."""
    legend = {"columns": {"expr": "width < 420 ? 3 : 5"}, "symbolOpacity": 1}
    shared = {"field": "kind", "type": "nominal", "title": None, "legend": legend}
    ranges = {"color": [f"var(--{kind})" for kind in kinds], "shape": [SHAPES[kind] for kind in kinds]}
    channels = {name: {**shared, "scale": {"domain": list(kinds), "range": each}} for name, each in ranges.items()}
    return {**channels, "opacity": {"field": "opacity", "type": "quantitative", "scale": None}}


def _said_of_points(table: CostTable) -> list[dict[str, str]]:
    """Rows of the box beside the pointer."""
    titles = {
        "name": "sub-network",
        f"shown.{table.name}": noun(table.name),
        "said": "value",
        "about": "losses",
        "widths": "widths",
        "source": "measured by",
    }
    return [{"field": field, "title": title} for field, title in titles.items()]


def width_map() -> Spec:
    """Width of every block as a share of its full one, a row a kind and a column a layer.

    Data set: `widths`.
    """
    # between the cells a gap as wide as a stroke in the page's colour, not a rule: the colours are the data
    return {**_read("widths"), "config": _read("look")}


def _read(name: str) -> Spec:
    """A part that nothing changes, as a file in Vega-Lite's own language.

    `look` has colours by name, so that a page goes from light to dark without drawing anew.
    """
    spec: Spec = json.loads((Path(__file__).parent / f"{name}.vl.json").read_text(encoding="utf-8"))
    return spec
