"""Options that several commands share: the request, the device, the latency table."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from flextron_lit.costs.workload import WORKLOADS, Workload, named
from flextron_lit.latency.latency_table import LatencyTable

DEFAULT_WORKLOAD = "chat"
OVERRIDES = {
    "batch_size": (int, "Sequences at once."),
    "prompt_tokens": (int, "Tokens of each prompt."),
    "generated_tokens": (int, "Tokens generated after it."),
    "dtype": (str, "Number type of weights and activations: float32, bfloat16 or float16."),
    "threads": (int, "Threads on a CPU; by default as many as torch takes."),
}


def add_workload(parser: ArgumentParser) -> None:
    """Options that say what is asked of the deployed model."""
    shapes = ((name, f"{w.batch_size} x {w.prompt_tokens} + {w.generated_tokens}") for name, w in WORKLOADS.items())
    known = "; ".join(f"{name}: {shape}" for name, shape in shapes)
    text = f"A common request (batch x prompt + generated tokens; {known})."
    parser.add_argument("--workload", default=None, help=f"{text} Default: {DEFAULT_WORKLOAD}.")
    for name, (kind, text) in OVERRIDES.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help=f"{text} Default: the workload's.")


def workload_of(options: Any) -> Workload:
    """The workload that a command line asks for.

    Raises:
        ValueError: if its name is unknown, or a number is out of range.
    """
    changes = {name: options[name] for name in OVERRIDES if options[name] is not None}
    return named(options.workload or DEFAULT_WORKLOAD, **changes)


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


def add_device(parser: ArgumentParser) -> None:
    """Option that says where to run."""
    text = "cpu, cuda, cuda:1. Default: a GPU if there is one, but the CPU if latencies were measured on a CPU alone."
    parser.add_argument("--device", type=str, default=None, help=text)


def add_latency(parser: ArgumentParser) -> None:
    """Option that says which latency table holds."""
    text = "Name of a latency table, where there are several: as `info` lists them, without costs/ and .json."
    parser.add_argument("--latency", type=str, default=None, help=text)
