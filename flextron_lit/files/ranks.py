"""Values of all data-parallel ranks."""

from typing import TypeVar

import torch

T = TypeVar("T")


def gather(value: T, world_size: int) -> list[T]:
    """The values of all ranks, on every rank."""
    if world_size == 1:
        return [value]
    values: list[T] = [value] * world_size
    torch.distributed.all_gather_object(values, value)
    return values
