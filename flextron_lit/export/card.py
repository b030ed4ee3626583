"""The model card: what was exported, how to load it, how good it is."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flextron_lit.costs import CostTable, Workload
from flextron_lit.export.forms import WrittenForm
from flextron_lit.export.small import SmallModel
from flextron_lit.export.verification import TOLERANCE, Verified
from flextron_lit.routers.from_budget import Selection
from flextron_lit.terminal.console import short

CITATION = """\
```bibtex
@inproceedings{cai2024flextron,
  title     = {Flextron: Many-in-One Flexible Large Language Model},
  author    = {Cai, Ruisi and Muralidharan, Saurav and Heinrich, Greg and Yin, Hongxu and Wang, Zhangyang and Kautz, Jan
               and Molchanov, Pavlo},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}
```"""


@dataclass(frozen=True)
class Origin:
    """Where a sub-network comes from, and what it is expected to cost."""

    source: str
    """The dense model that the elastic network was made of."""
    selection: Selection
    tables: Mapping[str, CostTable]
    """Every known cost."""
    workload: Workload
    """What they are counted for."""
    measured_on: str | None
    """Device of the latencies; None where none were measured."""
    text: str | None
    """What losses were measured on here; None where none were."""


def card(origin: Origin, small: SmallModel, name: str, written: WrittenForm, verified: Verified) -> str:
    """The README.md of an exported folder of that name."""
    parts = [
        _header(origin, written.library),
        f"# {name}\n",
        "One sub-network of an elastic network, cut out by flextron-lit (Flextron, Cai et al., ICML 2024).\n",
        *_facts(origin, small, written),
        f"\n## How to load\n\n{written.loading(name)}\n",
        "## Widths\n",
        *_widths(small),
        f"\n## Costs\n\n{_conditions(origin)}\n",
        *_costs(origin),
        "\n## Loss\n",
        *_losses(origin, verified),
        f"\n## Licence\n\nThat of the base model ({origin.source}) holds for these weights: state it before sharing.\n",
        f"## Citation\n\n{CITATION}\n",
    ]
    return "\n".join(parts)


def _header(origin: Origin, library: str) -> str:
    lines = ["---", f"library_name: {library}", "pipeline_tag: text-generation", "tags: [flextron]"]
    if origin.source.startswith("hub:"):
        lines.append(f"base_model: {origin.source.removeprefix('hub:').partition('@')[0]}")
    return "\n".join([*lines, "---", ""])


def _facts(origin: Origin, small: SmallModel, written: WrittenForm) -> Iterator[str]:
    share = small.parameters / small.full_parameters
    rows = {
        "base model": origin.source,
        "budget": origin.selection.budget,
        "chosen by": origin.selection.how,
        "parameters": f"{short(small.parameters)}, {share:.3f} of the full network's {short(small.full_parameters)}",
        "class": written.what,
        "weights": written.form.numbers,
    }
    yield "| | |"
    yield "|---|---|"
    yield from (f"| {name} | {value} |" for name, value in rows.items())


def _widths(small: SmallModel) -> Iterator[str]:
    yield "| layer | query heads | KV heads | neurons |"
    yield "|---:|---:|---:|---:|"
    for layer, (groups, neurons) in enumerate(zip(small.groups, small.neurons, strict=True)):
        attention = (groups * small.heads_per_group, groups) if groups else ("skipped", "skipped")
        yield f"| {layer} | {attention[0]} | {attention[1]} | {neurons or 'skipped'} |"


def _conditions(origin: Origin) -> str:
    w = origin.workload
    tokens = f"{w.prompt_tokens} prompt + {w.generated_tokens} generated tokens"
    latency = f"; latencies were measured on {origin.measured_on}" if origin.measured_on else ""
    return f"For a request of {w.batch_size} x ({tokens}) in {w.dtype}{latency}. Quantisation is not counted in."


def _costs(origin: Origin) -> Iterator[str]:
    yield "| cost | | of the full network |"
    yield "|---|---:|---:|"
    for name, table in origin.tables.items():
        sub_network = origin.selection.sub_network
        yield f"| {name} | {table.show(table.cost(sub_network))} | {table.ratio(sub_network):.3f} |"


def _losses(origin: Origin, verified: Verified) -> Iterator[str]:
    if verified.loss is not None:
        yield f"{verified.loss:.4f} nats per token on {origin.text}, measured on the files of this folder"
        yield f"(the elastic network in float32: {verified.elastic_loss:.4f})."
    else:
        known = {
            "predicted by the surrogate": origin.selection.predicted,
            "measured when the router's ladder was made": origin.selection.calibrated,
            "measured when it was searched for": origin.selection.loss,
        }
        found = [f"{loss:.4f} nats per token, {how}." for how, loss in known.items() if loss is not None]
        yield from found or ["Not measured; `--text FILE` measures it."]
    yield ""
    yield "Read back when it was written, and compared with the elastic network in float32 on random tokens:"
    if verified.difference <= TOLERANCE:
        yield f"the same logits, within {TOLERANCE:.0e} of the largest."
    else:
        yield (
            f"logits differ by up to {verified.difference:.1%} of the largest; the most likely token is the same at "
            f"{verified.agreement:.0%} of the positions."
        )
