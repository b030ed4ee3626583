"""What bitsandbytes' 8-bit AdamW keeps of each parameter, in shape alone."""

from typing import Any

import torch

SMALLEST = 4096
"""Numbers of a parameter below which its states stay in float32 (bitsandbytes' `min_8bit_size`)."""
BLOCK = 256
"""Numbers that share a scale."""


class EightBitStates(torch.optim.Optimizer):
    """Makes the states of `bitsandbytes.optim.AdamW8bit`; the update itself is in place, and nothing here.

    Args:
        parameters: to be trained.
    """

    def __init__(self, parameters: Any) -> None:
        # a rate to be told of, as stages log it
        super().__init__(parameters, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Make the states of parameters that have a gradient and none yet."""
        # Lightning's, which in manual optimisation does nothing
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = _states(parameter)
        return loss


def _states(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    if parameter.numel() < SMALLEST:
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("state1", "state2")}
    scales = -(-parameter.numel() // BLOCK)
    return {
        name: made
        for number in (1, 2)
        for name, made in (
            (f"state{number}", torch.zeros_like(parameter, dtype=torch.uint8)),
            (f"absmax{number}", torch.zeros(scales)),
        )
    }
