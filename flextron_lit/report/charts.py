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
    x = {**cost, "title": axis_title(table), "scale": {"zero": False, "padding": 16}, "axis": axis}
    spec = _read("trade_off")
    spec["description"] = f"Quality against {noun(table.name)}. The tables below have the same numbers."
    ladder, _, points, _ = (layer["encoding"] for layer in spec["layer"])
    for layer in spec["layer"]:
        layer["encoding"]["x"] = x
    ladder["order"] = cost
    points["color"]["scale"] = {"domain": list(kinds), "range": [f"var(--{kind})" for kind in kinds]}
    points["shape"]["scale"] = {"domain": list(kinds), "range": [SHAPES[kind] for kind in kinds]}
    points["tooltip"][1] = {"field": f"shown.{table.name}", "title": noun(table.name)}
    return {**spec, "config": _read("look")}


def width_map() -> Spec:
    """Width of every block as a share of its full one, a row a kind and a column a layer.

    Data set: `widths`.
    """
    # between the cells a gap as wide as a stroke in the page's colour, not a rule: the colours are the data
    return {**_read("widths"), "config": _read("look")}


def _read(name: str) -> Spec:
    """A part as a file in Vega-Lite's own language; what stands there as null depends on the network.

    `look` has colours by name, so that a page goes from light to dark without drawing anew.
    """
    spec: Spec = json.loads((Path(__file__).parent / f"{name}.vl.json").read_text(encoding="utf-8"))
    return spec
