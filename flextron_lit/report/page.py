"""What the report says, and in which order: the values that `report.html` puts into one web page."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from flextron_lit import checkpoint
from flextron_lit.costs import CostTable
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.evaluation.results import Results
from flextron_lit.files.damage import read_rows
from flextron_lit.latency.request import REQUEST
from flextron_lit.report import charts
from flextron_lit.report import evaluated_networks as evaluated
from flextron_lit.report.findings import Findings
from flextron_lit.report.generated_texts import Written
from flextron_lit.report.origin import domain_cells, invocations, stage_cells
from flextron_lit.report.page_data import embedded, to_json
from flextron_lit.report.remeasured import ratio_of, told
from flextron_lit.report.rendering import Section, Table, render
from flextron_lit.report.reported_folder import Source
from flextron_lit.report.summary import SUMMARY
from flextron_lit.space import KINDS
from flextron_lit.terminal.console import settings, short

NAMES = {"attention": "attention", "mlp": "MLP"}


def page(
    source: Source,
    backbone: ElasticBackbone,
    findings: Findings,
    written: tuple[str, Sequence[Written]],
    evaluations: Sequence[Results],
    *,
    evaluated_first: bool,
) -> str:
    """The page, as HTML in UTF-8: what can be read without scripts is plain HTML, charts come on top.

    Args:
        source: the files that it is made of.
        backbone: the network, or one of its shape without weights.
        findings: costs, points and ladder.
        written: what texts go on from, and the texts; none where they were not asked for.
        evaluations: what `evaluate` found.
        evaluated_first: whether the page is that of an evaluation, or only has it too.
    """
    history = checkpoint.read(source.checkpoint).history
    summary = read_rows(source.folder / SUMMARY)
    measured = list(evaluated.measures(evaluations, findings.space, findings.tables))
    parts = [(findings.validation, _sub_networks(findings, summary)), (measured, evaluated.sections(evaluations))]
    if evaluated_first:
        parts.reverse()
    measures = [measure for own, _ in parts for measure in own]
    data = to_json(findings, measures, summary, history)
    prompt, texts = written
    started = [(row["command"], row["date"], row["machine"]) for row in invocations(source.folder)]
    return render(
        "report.html",
        title=f"Flextron: {source.folder.resolve().name}",
        lead=_lead(backbone, findings),
        request=charts.request(findings.measured),
        axes={name: charts.axis_title(table) for name, table in findings.tables.items()},
        measures=measures,
        evaluated=bool(measured),
        ladder=data["ladder"],
        nouns=data["nouns"],
        notes=[*findings.notes, *told(summary)],
        sections=[section for _, own in parts for section in own],
        prompt=prompt,
        texts=texts,
        compute=_compute(source),
        commands=[*started, *evaluated.commands(evaluations)],
        stages=stage_cells(history, source.stages),
        domains=list(domain_cells(history)),
        settings=[(record.get("stage", "unknown"), _settings(record)) for record in history],
        data=Markup(embedded(data)),
        library=Markup(charts.library()),
    )


def _lead(backbone: ElasticBackbone, findings: Findings) -> str:
    """One line: which network this is."""
    parameters = short(sum(parameter.numel() for parameter in backbone.parameters.values()))
    layers = len({block.layer for block in findings.space.blocks})
    return f"{type(backbone.model).__name__}, {parameters} parameters, {layers} layers"


def _sub_networks(findings: Findings, summary: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Every point as a row, with the latencies that were measured beside the others; nothing without points."""
    points, tables = findings.points, findings.tables
    if not points:
        return []
    measured = {row["name"]: _measured(row, summary, tables.get(REQUEST)) for row in summary if "latency_ms" in row}
    domains = list(dict.fromkeys(domain for point in points for domain in point.losses))
    head = ["sub-network", "kind", *(f"{NAMES[kind]} width" for kind in KINDS)]
    head += [charts.axis_title(table) for table in tables.values()]
    head += ["latency, measured"] * bool(measured)
    rows = []
    for point in sorted(points, key=lambda point: point.value):
        costs = findings.shown(point.costs)
        cells = [point.name, point.kind + ", earlier weights" * point.earlier]
        cells += [f"{point.widths[kind]:.0%}" for kind in KINDS]
        cells += [costs.get(name, "") for name in tables]
        cells += [measured.get(point.name, "")] * bool(measured)
        cells += [f"{point.losses[domain]:.3f}" if domain in point.losses else "" for domain in domains]
        rows.append([*cells, f"{point.value:.3f}"])
    caption = "Losses in nats per token on validation documents, best first."
    return [("All sub-networks", [Table([*head, *domains, "mean loss"], rows, caption)])]


def _measured(row: Mapping[str, Any], summary: Sequence[Mapping[str, Any]], table: CostTable | None) -> str:
    """The latency that the summary has of a network, on the scale of the page's table, where there is one."""
    ratio = ratio_of(row, summary)
    if table is None or ratio is None:
        return f"{row['latency_ms']:.0f} ms"
    return f"{table.short(ratio * table.full)} ({ratio:.3f})"


def _compute(source: Source) -> str | None:
    """The page that the last stage with a dynamic router wrote of it."""
    pages = [stage.path / "compute.html" for stage in source.stages]
    return next((path.read_text(encoding="utf-8") for path in reversed(pages) if path.is_file()), None)


def _settings(record: Mapping[str, Any]) -> str:
    said = {name: value for name, value in record.items() if name not in ("stage", "data")}
    return "\n".join(settings(said))
