"""Dispatch on the first word. Commands import what they need when they run, so that help answers at once."""

from __future__ import annotations

import difflib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

HELP = """\
flextron-lit: one pretrained LLM becomes a family of nested sub-networks.

usage: python main.py COMMAND ...

commands
  pipeline   all stages of a config in turn; picks up at the first unfinished one
  fit        train one stage; the same command resumes an unfinished run
  validate   loss of the watched sub-networks on the validation documents
  test       the same on the test documents
  predict    loss on every test block, in RUN_FOLDER/predictions.jsonl
  profile    measure the latency of this device, with the table's own error
  select     the sub-network for a budget: widths, costs, loss
  export     one sub-network as a stand-alone model, for transformers or llama.cpp
  generate   text from a checkpoint within a budget, as it comes
  evaluate   loss and perplexity per budget with intervals, tasks of the LM evaluation harness
  reroute    train a router for another device or cost, from the kept surrogate
  highlight  a text shaded by what a dynamic router spends on each token, as a web page
  report     a pipeline, a run or a checkpoint as one web page, with a slider over budgets
  info       what a Flextron checkpoint holds and how it was made
  diff       how two Flextron checkpoints differ; exit code 0 if they do not

start here
  python main.py fit -c configs/debug.yaml              a tiny model, under a minute, no downloads
  python main.py pipeline -c configs/quickstart.yaml    a real LLM (SmolLM2-135M), half an hour on two cores

`python main.py COMMAND --help` explains every option; fit and pipeline show the resolved config with `--print_config`.
Settings of a class: fit --model.help flextron_lit.stages.ElasticTraining, --data.help flextron_lit.data.TextDataModule,
--trainer.callbacks.help callbacks.BudgetSampling.
FLEXTRON_DEBUG=1 shows where in the code an error was raised.
"""
USER_ERROR = 2
NOISE = (
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*is not supported by the model summary",
    r".*does not have many workers which may be a bottleneck",
    "You have overridden `on_before_batch_transfer`",
)
TIPS = "lightning.pytorch.utilities.rank_zero"


def _stage() -> int:
    from flextron_lit.commands.fit import StageCLI

    StageCLI()
    return 0


def _pipeline() -> int:
    from flextron_lit.commands.pipeline import command

    command(sys.argv[2:])
    return 0


def _end_with_the_reader() -> None:
    """Let `| head` end a command that only prints, quietly, as other tools do."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def _info() -> int:
    from flextron_lit.commands.info import command

    _end_with_the_reader()
    command(sys.argv[2:])
    return 0


def _profile() -> int:
    from flextron_lit.commands.profile import command

    command(sys.argv[2:])
    return 0


def _select() -> int:
    from flextron_lit.commands.select import command

    command(sys.argv[2:])
    return 0


def _export() -> int:
    from flextron_lit.commands.export import command

    command(sys.argv[2:])
    return 0


def _generate() -> int:
    from flextron_lit.commands.generate import command

    _end_with_the_reader()
    command(sys.argv[2:])
    return 0


def _evaluate() -> int:
    from flextron_lit.commands.evaluate import command

    command(sys.argv[2:])
    return 0


def _reroute() -> int:
    from flextron_lit.commands.reroute import command

    command(sys.argv[2:])
    return 0


def _highlight() -> int:
    from flextron_lit.commands.highlight import command

    command(sys.argv[2:])
    return 0


def _report() -> int:
    from flextron_lit.commands.report import command

    command(sys.argv[2:])
    return 0


def _diff() -> int:
    from flextron_lit.commands.diff import command

    _end_with_the_reader()
    return command(sys.argv[2:])


COMMANDS: dict[str, Callable[[], int]] = {
    "pipeline": _pipeline,
    "fit": _stage,
    "validate": _stage,
    "test": _stage,
    "predict": _stage,
    "profile": _profile,
    "select": _select,
    "export": _export,
    "generate": _generate,
    "evaluate": _evaluate,
    "reroute": _reroute,
    "highlight": _highlight,
    "report": _report,
    "info": _info,
    "diff": _diff,
}
"""What runs a command; the answer is the exit code."""


def main() -> int:
    """Run the command that `sys.argv` names; return the exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if arguments[0] not in COMMANDS:
        close = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        return _complain(f"unknown command {arguments[0]!r}{hint} Commands: {', '.join(COMMANDS)}")
    quieten()
    try:
        return COMMANDS[arguments[0]]()
    except _user_errors() as error:
        if os.environ.get("FLEXTRON_DEBUG"):
            traceback.print_exc()
        return _complain(str(error))


def _user_errors() -> tuple[type[Exception], ...]:
    """What a user's mistake raises."""
    # looked up, not imported: without Lightning there is none of its errors, and it takes seconds to load
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    return (ValueError, OSError, *([lightning.MisconfigurationException] if lightning else []))


def quieten() -> None:
    """Keep out of the log what the libraries say about themselves and no user can act on."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger(TIPS).addFilter(lambda record: "litlogger" not in record.getMessage())


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
