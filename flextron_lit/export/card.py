"""The model card: what was exported, how to load it, how good it is. What it says stands in `card.md`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template

from flextron_lit.costs import CostTable, Workload
from flextron_lit.export.forms import WrittenForm
from flextron_lit.export.small_model import SmallModel
from flextron_lit.export.verification import TOLERANCE, Verified
from flextron_lit.routers.from_budget import Selection
from flextron_lit.terminal.console import short


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
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return Template(text, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined).render(
        vars(origin),
        origin=origin,
        small=small,
        name=name,
        written=written,
        verified=verified,
        losses=[*_losses(origin, verified)],
        tolerance=TOLERANCE,
        short=short,
        zip=zip,
    )


def _losses(origin: Origin, verified: Verified) -> Iterator[str]:
    if verified.loss is not None:
        yield f"{verified.loss:.4f} nats per token on {origin.text}, measured on the files of this folder"
        yield f"(the elastic network in float32: {verified.elastic_loss:.4f})."
        return
    known = {
        "predicted by the surrogate": origin.selection.predicted,
        "measured when the router's ladder was made": origin.selection.calibrated,
        "measured when it was searched for": origin.selection.loss,
    }
    found = [f"{loss:.4f} nats per token, {how}." for how, loss in known.items() if loss is not None]
    yield from found or ["Not measured; `--text FILE` measures it."]
