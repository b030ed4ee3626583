"""A report from its parts: what was found, generated and evaluated of one network, written as one page."""

from collections.abc import Sequence
from pathlib import Path

import torch

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import shape_of
from flextron_lit.checkpoint.location import Location
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.evaluation.results import HTML, Results
from flextron_lit.evaluation.texts import Texts
from flextron_lit.files.damage import damage
from flextron_lit.files.ranks import tell
from flextron_lit.files.whole_file import write_page
from flextron_lit.generation.prompt import Inputs
from flextron_lit.latency.device_choice import device_of
from flextron_lit.model import FlextronModel
from flextron_lit.report.evaluated_networks import noted
from flextron_lit.report.findings import Findings, gather
from flextron_lit.report.generated_texts import Written, beginning, prompt_inputs, write_texts
from flextron_lit.report.page import page
from flextron_lit.report.reported_folder import Source
from flextron_lit.report.summary import written_since
from flextron_lit.terminal.console import show


def write_report(
    source: Source,
    output: Path | None = None,
    *,
    texts: bool = True,
    prompt: str | None = None,
    latency: str | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write the page, and say where.

    Args:
        source: what it is made of.
        output: where to; None means `report.html` in the run folder.
        texts: let the network write some, within several budgets; without, its weights are not read.
        prompt: what they go on from; None means the beginning of the validation text.
        latency: name of the latency table to use; None means the static router's, or the first.
        device: where texts are written.

    Raises:
        ValueError: if a file is damaged, there is no such latency table, no text says what to go on from, or the page
            cannot be written.
    """
    model = FlextronModel.from_pretrained(source.checkpoint, device=device).eval() if texts else None
    shape = shape_of(source.checkpoint, checkpoint.read(source.checkpoint).space) if model is None else model.backbone
    findings = gather(source, shape, latency)
    written = ("", []) if model is None else _written(model, findings, prompt_inputs(model.flextron, prompt))
    evaluations = noted(source.checkpoint, findings.notes)
    path = output or source.page
    # rows of summary, evaluations and histories are looked up all over the page
    what = "holds a file that is damaged"
    with damage(source.folder, "FLEXTRON_DEBUG=1 shows which; restore it, or delete it", what=what):
        html = page(source, shape, findings, written, evaluations, evaluated_first=False)
    write_page(path, html)
    show(f"wrote {path}")
    return path


def report_evaluation(
    location: Location, model: FlextronModel, results: Results, texts: Texts, latency: str | None
) -> None:
    """The page of one evaluation, beside its results: as that of its checkpoint, with what was evaluated first.

    What stands in its way is said: the results are safe in their own file.

    Args:
        location: the checkpoint.
        model: the same, loaded.
        results: what was found.
        texts: what it was evaluated on; what the network writes goes on from the first one's beginning.
        latency: name of the latency table to use; None means the static router's, or the first.
    """
    run, output = location.run, results.folder / HTML
    source = Source.of(location.checkpoint if run is None else run.path, location.checkpoint, run)
    try:
        findings = gather(source, model.backbone, latency)
        written = _written(model, findings, beginning(model.flextron, texts)) if texts else ("", [])
        write_page(output, page(source, model.backbone, findings, written, [results], evaluated_first=True))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        tell(f"note: there is no {output}: {error}")
    else:
        tell(f"wrote {output}")


def report_pipeline(folder: Path, stages: Sequence[RunFolder]) -> None:
    """The page of a finished pipeline, unless it is there. What stands in its way is said: no training is lost by it.

    Args:
        folder: of the pipeline.
        stages: run folders, in order.
    """
    source = Source(folder, stages[-1].checkpoint, tuple(stages))
    if written_since(source.page, source.checkpoint):
        show(f"the report is {source.page}")
        return
    try:
        write_report(source, device=device_of(None, source.checkpoint))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        show(f"note: there is no report: {error}\n`python main.py report {folder}` makes one, also with --no_texts")


def _written(model: FlextronModel, findings: Findings, prompt: tuple[Inputs, str]) -> tuple[str, list[Written]]:
    """What the texts go on from, and the texts."""
    inputs, words = prompt
    on_device = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    return words, list(write_texts(model, findings, on_device))
