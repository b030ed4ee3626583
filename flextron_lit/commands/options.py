"""Options that several commands share, and what they say: the checkpoint, the device, the request, the costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import shape_of
from flextron_lit.checkpoint.location import FOLDER_HELP, locate
from flextron_lit.costs import CostTable
from flextron_lit.costs.workload import WORKLOADS, Dtype, Workload, named
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.latency.latency_table import LatencyTable
from flextron_lit.terminal.console import about

DEFAULT_WORKLOAD = "chat"
OVERRIDES = {
    "batch_size": (int, "Sequences at once."),
    "prompt_tokens": (int, "Tokens of each prompt."),
    "generated_tokens": (int, "Tokens generated after it."),
    "dtype": (str, "Number type of weights and activations: float32, bfloat16 or float16."),
    "threads": (int, "Threads on a CPU; by default as many as torch takes."),
}


class CommandLine(ArgumentParser):
    """The parser of a command, with the options that several have."""

    @classmethod
    def on_checkpoint(cls, command: Callable[..., Any]) -> CommandLine:
        """Of a command that works on a Flextron checkpoint."""
        made = cls(**about(command))
        made.add_argument("--checkpoint", type=Path, required=True, help=FOLDER_HELP)
        return made

    def add_text(self, text: str, tokens: str) -> None:
        """What to measure on, with what there is to say of it."""
        self.add_argument("--text", type=Path, help=text)
        self.add_argument("--tokens", type=int, help=tokens)

    def add_workload(self) -> None:
        """What is asked of the deployed model."""
        shapes = ((name, f"{w.batch_size} x {w.prompt_tokens} + {w.generated_tokens}") for name, w in WORKLOADS.items())
        known = "; ".join(f"{name}: {shape}" for name, shape in shapes)
        text = f"A common request (batch x prompt + generated tokens; {known})."
        self.add_argument("--workload", help=f"{text} Default: {DEFAULT_WORKLOAD}.")
        for name, (kind, text) in OVERRIDES.items():
            self.add_argument(f"--{name}", type=kind, help=f"{text} Default: the workload's.")

    def add_device(self) -> None:
        """Where to run."""
        text = "a GPU if there is one, but the CPU if latencies were measured on a CPU alone."
        self.add_argument("--device", type=str, help=f"cpu, cuda, cuda:1. Default: {text}")

    def add_latency(self) -> None:
        """Which latency table holds."""
        text = "Name of a latency table, where there are several: as `info` lists them, without costs/ and .json."
        self.add_argument("--latency", type=str, help=text)

    def add_costs(self) -> None:
        """What networks cost: the latency table, the request, the device."""
        self.add_latency()
        self.add_workload()
        self.add_device()

    def add_loading(self, *dtypes: str) -> None:
        """How a network is loaded that answers budgets; `dtypes` are number types beside the usual ones."""
        self.add_latency()
        self.add_device()
        text = "Number type of weights and activations."
        self.add_argument("--dtype", choices=(*get_args(Dtype), *dtypes), default="float32", help=text)

    def add_compile(self) -> None:
        """In which mode the network runs."""
        text = "Run by code compiled for each width: seconds each the first time, then kept. Latencies are others."
        self.add_argument("--compile", action="store_true", help=text)

    def add_json(self) -> None:
        """For scripts that read what is printed."""
        self.add_argument("--json", action="store_true", help="Print JSON alone, for scripts.")


def place_of(options: Any) -> tuple[Path, torch.device]:
    """The checkpoint that a command line names, and where to run it.

    Raises:
        ValueError: if it names none, or one of which a file other than weights is damaged, or a device that cannot be
            used.
    """
    folder = locate(options.checkpoint).checkpoint
    checkpoint.verify_small(folder)
    return folder, device_of(options.device, folder)


def workload_of(options: Any) -> Workload:
    """The workload that a command line asks for.

    Raises:
        ValueError: if its name is unknown, or a number is out of range.
    """
    changes = {name: options[name] for name in OVERRIDES if options[name] is not None}
    return named(options.workload or DEFAULT_WORKLOAD, **changes)


def costs_of(
    options: Any, folder: Path, device: torch.device, *, compiled: bool = False
) -> tuple[dict[str, CostTable], LatencyTable | None]:
    """The cost tables of a checkpoint that a command line asks for, as `known_tables` gives them.

    Args:
        options: of a command that has those of `add_costs`.
        folder: the checkpoint.
        device: where it will run.
        compiled: in which mode.

    Raises:
        ValueError: as `known_tables`, or if the workload is none.
    """
    shape = shape_of(folder, checkpoint.read(folder).space)
    workload = workload_of(options)
    return known_tables(folder, shape, workload, options.latency, device, compiled=compiled)


def refuse_workload(options: Any, latency: LatencyTable | None) -> None:
    """Refuse options that describe a request where a latency table says it: costs are those of the one measured.

    Raises:
        ValueError: naming one that was given. Not `dtype`, which says more than that in some commands.
    """
    given = [name for name in ("workload", *OVERRIDES) if name != "dtype" and options[name] is not None]
    if given and latency is not None:
        raise ValueError(
            f"--{given[0]} has no effect: costs are those of the request that was measured, {latency.workload.name}; "
            "measure another one with `profile`, and name its table with --latency"
        )


def refuse_below_one(options: Any, *names: str) -> None:
    """Refuse counts that are none.

    Raises:
        ValueError: naming one that was given.
    """
    for name in names:
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"--{name} must be 1 or more, not {options[name]}")


def refuse_compiled(options: Any, *names: str) -> None:
    """Refuse `--compile` beside options with which the network runs as it is.

    Raises:
        ValueError: naming one that was given.
    """
    for name in names:
        if options.compile and options[name]:
            raise ValueError(f"--compile has no effect with --{name}, which runs the network as it is; leave one out")
