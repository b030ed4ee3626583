"""The charts of the report as Vega-Lite specifications; `report.js` feeds them, and colours are those of `report.css`.

Vega draws SVG, says what it shows to screen readers, and is small enough (0.9 MB) to be part of every page (ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
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
    said = [
        {"field": "name", "title": "sub-network"},
        {"field": f"shown.{table.name}", "title": noun(table.name)},
        {"field": "said", "title": "value"},
        {"field": "about", "title": "losses"},
        {"field": "widths", "title": "widths"},
        {"field": "source", "title": "measured by"},
    ]
    domain = list(kinds)
    look: Spec = {
        "color": {"field": "kind", "scale": {"domain": domain, "range": [f"var(--{kind})" for kind in domain]}},
        "shape": {"field": "kind", "scale": {"domain": domain, "range": [SHAPES[kind] for kind in domain]}},
        "opacity": {"field": "opacity", "type": "quantitative", "scale": None},
    }
    legend = {"columns": {"expr": "width < 420 ? 3 : 5"}, "symbolOpacity": 1}
    for channel in ("color", "shape"):
        look[channel] |= {"type": "nominal", "title": None, "legend": legend}
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
                "encoding": {**place, **look, "tooltip": said},
            },
            {"name": "ring", "data": {"name": "chosen"}, "mark": ring, "encoding": rung},
        ],
        "config": _config(),
    }


def width_map() -> Spec:
    """Width of every block as a share of its full one, a row a kind and a column a layer.

    Data set: `widths`.
    """
    said = [{"field": "kind"}, {"field": "layer"}, {"field": "about", "title": "width"}]
    legend = {"title": "share of the full width", "format": ".0%", "orient": "bottom", "gradientLength": 160}
    return {
        "description": "Width of every layer at the chosen budget, as a share of the full width.",
        "width": "container",
        "height": 72,
        "data": {"name": "widths"},
        # a gap between the cells, not a rule: the colours are the data
        "mark": {"type": "rect", "stroke": "var(--page)", "strokeWidth": 1},
        "encoding": {
            "x": {"field": "layer", "type": "ordinal", "axis": {"labelAngle": 0, "labelOverlap": True}},
            "y": {"field": "kind", "type": "nominal", "title": None, "sort": None},
            "color": {
                "field": "share",
                "type": "quantitative",
                "scale": {"domain": [0, 1], "scheme": "viridis"},
                "legend": legend,
            },
            "tooltip": said,
        },
        "config": _config(),
    }


def _config() -> Spec:
    """Colours by name, so that a page goes from light to dark without drawing anew."""
    text = {"labelColor": "var(--ink)", "titleColor": "var(--ink)", "labelFontSize": 12, "titleFontSize": 13}
    lines = {"domainColor": "var(--faint)", "tickColor": "var(--faint)", "gridColor": "var(--rule)"}
    return {
        "background": "transparent",
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {**text, **lines, "titleFontWeight": "normal"},
        "legend": {**text, "titleFontWeight": "normal", "orient": "bottom", "symbolSize": 110},
    }
