"""The report as one web page: everything that can be read without scripts is plain HTML, charts come on top."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from flextron_lit.evaluation.results import Results
from flextron_lit.report import charts
from flextron_lit.report import evaluated_networks as evaluated
from flextron_lit.report.findings import Findings
from flextron_lit.report.generated_texts import Written
from flextron_lit.report.page_data import embedded, shown, to_json
from flextron_lit.report.points import Measure
from flextron_lit.space import KINDS
from flextron_lit.terminal.console import duration, settings

NAMES = {"attention": "attention", "mlp": "MLP"}
POLICY = (
    # nothing is fetched, whatever a text or a name says; the library compiles the formulas of a chart
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'; img-src data:"
)


@dataclass(frozen=True)
class Content:
    """What a page says."""

    title: str
    lead: str
    """One sentence: which network this is."""
    findings: Findings
    summary: Sequence[Mapping[str, Any]]
    """Rows of `summary.json`; empty without one."""
    prompt: str
    texts: Sequence[Written]
    """Empty where they were not asked for."""
    evaluations: Sequence[Results]
    """What `evaluate` found."""
    evaluated_first: bool
    """Whether the page is that of an evaluation, or only has it too."""
    compute: str | None
    """The page of a dynamic router's compute, if a run wrote one."""
    invocations: Sequence[Mapping[str, str]]
    stages: Sequence[Mapping[str, Any]]
    domains: Sequence[Mapping[str, Any]]
    history: Sequence[Mapping[str, Any]]


def page(content: Content) -> str:
    """The page, as HTML in UTF-8."""
    findings = content.findings
    measures = _measures(content)
    data = to_json(findings, measures, content.summary, content.history)
    here = Path(__file__).parent
    style, script = ((here / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    body = [
        f'<header><h1>{escape(content.title)}</h1><p class="faint">{escape(content.lead)}</p></header>',
        "<main>",
        *_trade_off(findings, measures, data["ladder"]),
        *_tables(content),
        *_texts(content),
        *_compute(content.compute),
        *_origin(content),
        "</main>",
        f'<script type="application/json" id="data">{embedded(data)}</script>',
        f"<script>{charts.library()}</script>",
        f"<script>{script}</script>",
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f"<title>{escape(content.title)}</title>",
            f"<style>{style}</style></head>",
            "<body>",
            *body,
            "</body>",
            "</html>\n",
        ]
    )


def _measures(content: Content) -> list[Measure]:
    findings = content.findings
    found = list(evaluated.measures(content.evaluations, findings.space, findings.tables))
    return [*found, *findings.validation] if content.evaluated_first else [*findings.validation, *found]


def _trade_off(findings: Findings, measures: Sequence[Measure], ladder: Mapping[str, Any] | None) -> Iterator[str]:
    yield "<h2>Quality against cost</h2>"
    yield "<noscript><p>The charts need JavaScript; the tables below have their numbers.</p></noscript>"
    yield f'<p class="faint">{escape(charts.request(findings.measured))}</p>'
    yield "<fieldset><legend>cost:</legend>"
    for number, (name, table) in enumerate(findings.tables.items()):
        checked = " checked" * (number == 0)
        title = escape(charts.axis_title(table))
        yield f'<label><input type="radio" name="cost" value="{escape(name)}"{checked}> {title}</label>'
    yield "</fieldset>"
    if len(measures) > 1:
        options = "".join(f"<option>{escape(measure.name)}</option>" for measure in measures)
        yield f'<p><label for="measure">quality:</label> <select id="measure">{options}</select></p>'
    yield '<div class="charts"><div class="chart" id="trade-off"></div>'
    if ladder is not None:
        yield from _slider(ladder)
        yield '<section class="widths"><h3>What each layer gets</h3><div class="chart" id="widths"></div></section>'
    yield '<div class="notes"><p class="faint" id="hidden" role="status"></p>'
    if len(measures) > len(findings.validation):
        yield '<p class="faint">Evaluated points have 95 % intervals; of a score they are 1.96 standard errors.</p>'
    if ladder is not None:
        measured = "measured on calibration text" if ladder["losses"] == "measured" else "predicted by the surrogate"
        yield (
            '<p class="faint" id="ladder">The line is the ladder of the static router, its losses '
            f"{measured}, so it need not run through the points. The ring is the slider's budget.</p>"
        )
    yield from (f'<p class="faint">{escape(note)}</p>' for note in findings.notes)
    yield "</div></div>"


def _slider(ladder: Mapping[str, Any]) -> Iterator[str]:
    first, last = (f"{ladder['rungs'][index]['ratio']:.2f}" for index in (0, -1))
    label = f"Budget: share of the full network's {charts.noun(ladder['cost'])}, {first} to {last}"
    span = f'min="0" max="{len(ladder["rungs"]) - 1}" step="1" value="{ladder["start"]}"'
    yield f'<div class="panel budget"><label for="budget">{escape(label)}</label>'
    yield f'<input type="range" id="budget" {span}>'
    yield '<dl id="chosen"></dl></div>'


def _tables(content: Content) -> Iterator[str]:
    yield from _evaluated(content.evaluations) if content.evaluated_first else _sub_networks(content)
    yield from _sub_networks(content) if content.evaluated_first else _evaluated(content.evaluations)


def _evaluated(evaluations: Sequence[Results]) -> Iterator[str]:
    for results in evaluations:
        yield f"<h2>Evaluated: {escape(evaluated.name_of_folder(results))}</h2>"
        if results.losses is not None:
            said = "Losses in nats per token ± half of the 95 % interval; differences over all texts."
            yield _table(*evaluated.loss_table(results.losses["rows"]), said)
        for rows in evaluated.by_limit(results.tasks).values():
            said = f"Scores ± the harness's standard error. Questions: {evaluated.questions(rows) or 'not said'}."
            yield _table(*evaluated.score_table(rows), said)


def _sub_networks(content: Content) -> Iterator[str]:
    """Every point as a row, with the latencies that were measured beside the others."""
    points, tables = content.findings.points, content.findings.tables
    if not points:
        return
    measured = {row["name"]: row["latency_ms"] for row in content.summary if "latency_ms" in row}
    domains = list(dict.fromkeys(domain for point in points for domain in point.losses))
    head = ["sub-network", "kind", *(f"{NAMES[kind]} width" for kind in KINDS)]
    head += [charts.axis_title(table) for table in tables.values()]
    head += ["latency, measured"] * bool(measured)
    rows = []
    for point in sorted(points, key=lambda point: point.value):
        costs = shown(point.costs, content.findings)
        cells = [point.name, point.kind + ", earlier weights" * point.earlier]
        cells += [f"{point.widths[kind]:.0%}" for kind in KINDS]
        cells += [costs.get(name, "") for name in tables]
        cells += [f"{measured[point.name]:.0f} ms" if point.name in measured else ""] * bool(measured)
        rows.append([*cells, *(_number(point.losses.get(domain)) for domain in domains), f"{point.value:.3f}"])
    yield "<h2>All sub-networks</h2>"
    yield _table([*head, *domains, "mean loss"], rows, "Losses in nats per token on validation documents, best first.")


def _texts(content: Content) -> Iterator[str]:
    if not content.texts:
        return
    yield "<h2>What it writes</h2>"
    yield '<p class="faint">The same words, in grey, and their likeliest continuation.</p>'
    yield '<div class="texts">'
    for text in content.texts:
        yield f'<section class="panel"><h3>{escape(text.title)} <small>{escape(text.spent)}</small></h3>'
        if text.missing:
            yield f'<p class="faint">{escape(text.missing)}</p></section>'
            continue
        words = f"<mark>{_words(content.prompt)}</mark>{_words(text.text)}"
        yield f'<p lang="" translate="no" dir="auto">{words}</p></section>'
    yield "</div>"


def _words(text: str) -> str:
    # a bare carriage return would be read as a line feed
    return escape(text).replace("\r", "&#13;")


def _compute(compute: str | None) -> Iterator[str]:
    """A page of its own in a frame: its style and its headings stay apart from these."""
    if compute is None:
        return
    yield "<h2>What each token gets</h2><details><summary>Text shaded by what the dynamic router spends</summary>"
    yield f'<iframe id="compute" title="Text shaded by compute" srcdoc="{escape(compute)}"></iframe></details>'


def _origin(content: Content) -> Iterator[str]:
    yield "<h2>Where it comes from</h2>"
    invocations = [*content.invocations, *evaluated.commands(content.evaluations)]
    if invocations:
        rows = [[row["command"], row["date"], row["machine"]] for row in invocations]
        yield _table(["command", "started", "machine"], rows, "Commands that trained or evaluated it.", "words")
    head = ["stage", "run folder", "steps", "tokens", "seed", "started", "took", "git commit"]
    yield _table(
        head, [_stage(row) for row in content.stages], "Stages. The time of a resumed one includes its pauses."
    )
    if content.domains:
        rows = [
            [
                row["domain"],
                row["source"],
                "" if row["weight"] is None else f"{row['weight']:g}",
                ", ".join(f"{n:,} {s}" for s, n in row["tokens"].items()),
            ]
            for row in content.domains
        ]
        yield _table(["domain", "source", "weight", "tokens"], rows, "Training text.", "words")
    for number, record in enumerate(content.history, 1):
        said = {name: value for name, value in record.items() if name not in ("stage", "data")}
        lines = "\n".join(settings(said))
        name = escape(str(record.get("stage", "unknown")))
        yield f"<details><summary>settings of stage {number}: {name}</summary><pre>{escape(lines)}</pre></details>"


def _stage(row: Mapping[str, Any]) -> list[str]:
    counts = [f"{row[name]:,}" if row[name] is not None else "" for name in ("steps", "tokens")]
    took = duration(row["seconds"]) if "seconds" in row else ""
    commit = (row["git_commit"] or "")[:10] + "-dirty" * (row["git_commit"] or "").endswith("-dirty")
    seed = "" if row["seed"] is None else str(row["seed"])
    return [row["stage"], row["folder"], *counts, seed, row.get("started", ""), took, commit]


def _number(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.3f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, kind: str = "numbers") -> str:
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    # can be scrolled by keys where it is wider than the page
    lines = [f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">']
    lines += [f"<caption>{escape(caption)}</caption><thead><tr>{titles}</tr></thead><tbody>"]
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])
