"""Data-parallel ranks: values of all of them, and lines that one of them says."""

import logging
import os
from typing import TypeVar

import torch

T = TypeVar("T")
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
"""Where launchers say which rank a process is."""
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


def tell(line: str) -> None:
    """Say something beside a command's output, on standard error and once: the first rank says it.

    As Lightning's `rank_zero_info`, which takes seconds to import where nothing is trained.
    """
    if _is_first():
        LOG.info(line)


def _is_first() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == 0
    # a launcher has started this process, and the group is not there yet
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
