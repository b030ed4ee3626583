"""Bytes of a real step's tensors, by torch's memory tracker."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed._tools.mem_tracker import MemTracker


class Bytes(MemTracker):
    """Of all tensors, whatever module makes them: the original refuses modules that run more than once."""

    def _ignore(self, *_: Any) -> None:
        pass

    _pre_fw_hook = _post_fw_hook = _pre_bw_hook = _post_bw_hook = _ignore

    def peak(self) -> dict[Any, int]:
        """By kind, and in all (`Total`), when all of them are most."""
        (found,) = self.get_tracker_snapshot("peak").values()
        return found


def keep_states(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Have optimizers keep what they keep from the steps before: of gradients that are 0 they change nothing."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
