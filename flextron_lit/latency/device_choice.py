"""Where a command runs if nobody says."""

from pathlib import Path

import torch

from flextron_lit.latency.latency_table import measured_on


def device_of(name: str | None, checkpoint: Path | None = None) -> torch.device:
    """The device that a command line asks for, by default a GPU if there is one.

    Args:
        name: of the device; None means the default.
        checkpoint: whose budgets are to be answered: if its latencies were all measured on a CPU, that is the default.

    Raises:
        ValueError: if there is none of that name, or a latency table is damaged.
    """
    if name is None:
        gpu = torch.cuda.is_available() and (checkpoint is None or measured_on(checkpoint) != {"cpu"})
        return torch.device("cuda" if gpu else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"cannot use the device {name!r}: {str(error).splitlines()[0]}") from error
    return device
