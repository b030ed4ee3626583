"""flextron-lit: one pretrained LLM becomes a family of nested sub-networks.

usage: python main.py COMMAND ...

commands
{commands}

start here
  python main.py fit -c configs/debug.yaml              a tiny model, under a minute, no downloads
  python main.py pipeline -c configs/quickstart.yaml    a real LLM (SmolLM2-135M), twenty minutes on two cores
  python main.py pipeline -c configs/depth.yaml         the same with whole layers in place of narrower ones

`python main.py COMMAND --help` explains every option; fit and pipeline show the resolved config with `--print_config`.
Settings of a class: fit --model.help flextron_lit.stages.ElasticTraining, --data.help flextron_lit.data.TextDataModule,
--trainer.callbacks.help callbacks.BudgetSampling.
FLEXTRON_DEBUG=1 shows where in the code an error was raised.
"""

import difflib
import importlib
import logging
import os
import sys
import threading
import traceback
import warnings

from flextron_lit.files.starter import end_with_starter
from flextron_lit.files.whole_file import is_full

COMMANDS = {
    "plan": ("plan", "what training a model takes, before a GPU is rented: bytes, hours, which settings fit"),
    "convert": ("convert", "a pretrained model as an elastic one that answers budgets, in minutes, without training"),
    "pipeline": ("pipeline", "all stages of a config in turn; picks up at the first unfinished one"),
    "fit": ("fit", "train one stage; the same command resumes an unfinished run"),
    "validate": ("fit", "loss of the watched sub-networks on the validation documents"),
    "test": ("fit", "the same on the test documents"),
    "predict": ("fit", "loss on every test block, in RUN_FOLDER/predictions.jsonl"),
    "profile": ("profile", "measure the latency of this device, with the table's own error"),
    "select": ("select", "the sub-network for a budget: widths, costs, loss"),
    "export": ("export", "one sub-network as a stand-alone model, for transformers or llama.cpp"),
    "generate": ("generate", "text from a checkpoint within a budget, as it comes"),
    "serve": ("serve", "an OpenAI-compatible server: every budget is a model, all from one set of weights"),
    "evaluate": ("evaluate", "loss and perplexity per budget with intervals, tasks of the LM evaluation harness"),
    "reroute": ("reroute", "train a router for another device or cost, from the kept surrogate"),
    "highlight": ("highlight", "a text shaded by what a dynamic router spends on each token, as a web page"),
    "report": ("report", "a pipeline, a run or a checkpoint as one web page, with a slider over budgets"),
    "info": ("info", "what a Flextron checkpoint holds and how it was made"),
    "diff": ("diff", "how two Flextron checkpoints differ; exit code 0 if they do not"),
}
"""Name: the module here that runs it by its `command(args) -> int | None` (the exit code), and one line of help. A new
command is one file and one row."""
# what `--help` prints is what this module says of itself
HELP = f"{__doc__}".format(commands="\n".join(f"  {name:<11}{line}" for name, (_, line) in COMMANDS.items()))
USER_ERROR = 2
NOISE = (
    r".*isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*is not supported by the model summary",
    r".*does not have many workers which may be a bottleneck",
    "You have overridden `on_before_batch_transfer`",
    "You're using the WeightAveraging callback with a model that overrides",
)
TIPS = "lightning.pytorch.utilities.rank_zero"


def main() -> int:
    """Run the command that `sys.argv` names; return the exit code."""
    name, *arguments = sys.argv[1:] or ["help"]
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else "."
        return _complain(f"unknown command {name!r}{hint} Commands: {', '.join(COMMANDS)}")
    quieten()
    # an installed command does not look there by itself, and configs may name classes of the user's own modules
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    end_with_starter()
    try:
        # imported here: help must answer at once, and most commands need only some of the libraries
        command = importlib.import_module(f"{__name__}.{COMMANDS[name][0]}").command
        return command(arguments) or 0
    except _user_errors() as error:
        if os.environ.get("FLEXTRON_DEBUG"):
            traceback.print_exc()
        return _complain(_told(error))


def _told(error: Exception) -> str:
    """What an error says; of one of Python's own, what it means where a file is read."""
    if isinstance(error, UnicodeDecodeError):
        return f"a file that the command line names is no UTF-8 text ({error})"
    if isinstance(error, RecursionError):
        return "a file that the command line names is nested too deeply"
    if is_full(error):
        return f"{error}; what was there before stays: make room, then run the same command again"
    return str(error)


def _user_errors() -> tuple[type[Exception], ...]:
    """What a user's mistake raises; a file that is nested without end, the last."""
    # looked up, not imported: without Lightning there is none of its errors, and it takes seconds to load
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    return (ValueError, OSError, RecursionError, *([lightning.MisconfigurationException] if lightning else []))


def quieten() -> None:
    """Keep out of the log what the libraries say about themselves and no user can act on."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger(TIPS).addFilter(lambda record: "litlogger" not in record.getMessage())
    threading.excepthook = _of_thread


def _of_thread(raised: threading.ExceptHookArgs) -> None:
    """As Python's own, but for a full disk: TensorBoard's thread meets it, and the next that is logged raises it."""
    if not is_full(raised.exc_value):
        threading.__excepthook__(raised)


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
