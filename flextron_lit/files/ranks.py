"""Data-parallel ranks: values of all of them, and lines that one of them says."""

import logging
import os
from typing import TypeVar

import torch

T = TypeVar("T")
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Where launchers say which rank a process is."""
TRANSPORTS = ("gloo", "NCCL", "Connection reset", "Connection closed", "ProcessGroup")
"""How errors of waiting for other processes can be told: by the library that waited."""
LOG = logging.getLogger("flextron_lit")
LOG.setLevel(logging.INFO)
LOG.addHandler(logging.StreamHandler())


def gather(value: T, world_size: int) -> list[T]:
    """The values of all ranks, on every rank."""
    if world_size == 1:
        return [value]
    values: list[T] = [value] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def lost_another(error: RuntimeError) -> bool:
    """Whether an error is that of a process that waited in vain for another one of its group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    # what gloo says of a connection is a plain RuntimeError
    return isinstance(error, torch.distributed.DistError) or any(name in str(error) for name in TRANSPORTS)


def tell(line: str) -> None:
    """Say something beside a command's output, on standard error and once: the first rank says it.

    As Lightning's `rank_zero_info`, which takes seconds to import where nothing is trained.
    """
    if is_first():
        LOG.info(line)


def is_first() -> bool:
    """Whether this process speaks and writes for all, also before they know of each other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    # a launcher has started this process, and the group is not there yet
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
