"""`python main.py report`: a pipeline, a run or a checkpoint as one web page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from flextron_lit.commands.options import CommandLine
from flextron_lit.latency.device_choice import device_of
from flextron_lit.report.assembly import write_report
from flextron_lit.report.reported_folder import find
from flextron_lit.terminal.console import about


def command(args: Sequence[str]) -> None:
    """A pipeline, a run or a checkpoint as one web page: trade-off, widths at every budget, texts, origin.

    The page works offline. Example: main.py report runs/quickstart
    """
    parser = CommandLine(**about(command))
    parser.add_argument("folder", type=Path, help="The run folder of a pipeline or a stage, or a Flextron checkpoint.")
    parser.add_argument("--output", type=Path, help="Where to write it (report.html in the run folder).")
    parser.add_argument("--no_texts", action="store_true", help="Leave the texts out: seconds, no weights are read.")
    parser.add_argument("--prompt", type=str, help="What texts go on from (the validation text).")
    parser.add_latency()
    parser.add_device()
    options = parser.parse_args(list(args))
    if options.no_texts and options.prompt is not None:
        raise ValueError("--prompt has no effect with --no_texts; leave one of them out")
    source = find(options.folder)
    write_report(
        source,
        options.output,
        texts=not options.no_texts,
        prompt=options.prompt,
        latency=options.latency,
        device=device_of(options.device, source.checkpoint),
    )
