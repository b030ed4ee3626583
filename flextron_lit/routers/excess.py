"""The table of excess losses: what each block loses at each width by itself, computed and not measured (ours).

It answers budgets before a surrogate exists: the sum over blocks is to be small.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn.utils.rnn import pad_sequence

from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.whole_file import json_text
from flextron_lit.routers.feasible_decoding import Additive
from flextron_lit.space import ElasticSpace

FILE = "elastic/excess_losses.json"
POWER = 0.7
"""Of an entry in the sum: to second order large errors are overrated, since losses saturate."""


@dataclass(frozen=True)
class ExcessTable:
    """Nats per token that a block at a width adds to the loss, all others at full width; to second order."""

    blocks: tuple[tuple[float, ...], ...]
    """2L rows of that block's number of choices, the last 0."""
    tokens: int
    """That it was computed on."""

    def objective(self) -> Additive:
        """What a search makes small: no loss, but networks that it ranks low lose little."""
        rows = [torch.tensor(row).clamp(min=0) ** POWER for row in self.blocks]
        return Additive(pad_sequence(rows, batch_first=True))

    def to_bytes(self, space: ElasticSpace) -> bytes:
        """A JSON file that people can read, a row a block by its name."""
        named = {block.name: list(row) for block, row in zip(space.blocks, self.blocks, strict=True)}
        content: dict[str, Any] = {"unit": "nats per token", "tokens": self.tokens, "blocks": named}
        return json_text(content).encode()

    @classmethod
    def read(cls, folder: Path, space: ElasticSpace) -> Self | None:
        """The table of a Flextron checkpoint; None if it has none.

        Raises:
            ValueError: if the file is damaged, or belongs to another space.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        with damage(path, "convert the model again", what="is damaged, or of another space"):
            content = read_json(path)
            rows = tuple(tuple(map(float, content["blocks"][block.name])) for block in space.blocks)
            if [len(row) for row in rows] != [len(block.widths) for block in space.blocks]:
                raise ValueError("its rows are not those of the space")
            return cls(rows, int(content["tokens"]))
