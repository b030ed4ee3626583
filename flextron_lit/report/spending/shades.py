"""Shades for the cost of a token: one hue, lighter to stronger, so that colour vision does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LIGHT = ("#fffbe6", "#fff0b8", "#fee391", "#fecd5e", "#fdb13a", "#f6912c", "#e97a1c")
"""Backgrounds of dark text, from the least compute to the most."""
DARK = ("#2b2116", "#402c14", "#563710", "#6c420c", "#834b08", "#9a5204", "#ae5602")
"""Backgrounds of light text."""
INK_ON_LIGHT, INK_ON_DARK = "#1a1a1a", "#f2f2f2"
LEVELS = len(LIGHT)
FINEST = 0.01
"""Least range of costs that a shade stands for: less is no difference worth seeing."""
TAIL = 0.02
"""Share of the tokens at either end that may lie outside the scale: one odd token must not fade all others."""


@dataclass(frozen=True)
class Scale:
    """Which costs have which shade."""

    low: float
    high: float

    @classmethod
    def of(cls, costs: Sequence[Tensor]) -> Scale:
        """The scale of some texts' costs, [tokens] each."""
        low, high = torch.cat(list(costs)).float().quantile(torch.tensor([TAIL, 1 - TAIL])).tolist()
        missing = max(0.0, LEVELS * FINEST - (high - low))
        return cls(low - missing / 2, high + missing / 2)

    def level(self, cost: float) -> int:
        """0 for the least compute to `LEVELS` - 1 for the most."""
        return min(max(int((cost - self.low) / (self.high - self.low) * LEVELS), 0), LEVELS - 1)

    def start(self, level: int) -> float:
        """The lowest cost of a level's range."""
        return self.low + level * (self.high - self.low) / LEVELS
