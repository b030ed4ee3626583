"""The weights of a checkpoint, tensor by tensor and never all at once."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from flextron_lit import checkpoint
from flextron_lit.files.damage import damage

PARTS = {
    # norms first: post_attention_layernorm is one of them
    "norms": ("norm", "ln_"),
    "attention": ("attn", "attention."),
    "mlp": ("mlp",),
    "embedding": ("embed", "wte", "wpe", "lm_head"),
}
"""What the parts of a network are called in tensor names; the first that fits counts."""
OTHER = "other"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class Header:
    """What a file says of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors writes it: F32, BF16."""

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


class Weights:
    """The full network's weights, of a checkpoint whose files `checkpoint.read` has found whole.

    Args:
        folder: the checkpoint.
        compensation: with what narrower widths have of their own, under the names of their blocks.

    Raises:
        ValueError: if a weight file is missing or damaged.
    """

    def __init__(self, folder: Path, *, compensation: bool = False) -> None:
        self._files: dict[str, Path] = {}
        self.headers: dict[str, Header] = {}
        own = folder / checkpoint.COMPENSATION
        for path in [*checkpoint.weight_files(folder), *([own] if compensation and own.is_file() else [])]:
            with damage(path, checkpoint.MEND), safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    tensor: Any = file.get_slice(name)
                    self._files[name] = path
                    self.headers[name] = Header(tuple(tensor.get_shape()), tensor.get_dtype())

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        # opened afresh, because an open file keeps every page that was read in memory
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)


def part_of(name: str) -> str:
    """The part of the network that a tensor belongs to."""
    return next((part for part, spellings in PARTS.items() if any(s in name for s in spellings)), OTHER)


def count_parameters(headers: Mapping[str, Header], *, tied: bool) -> dict[str, int]:
    """Parameters per part of the network.

    Args:
        headers: of all tensors.
        tied: the output layer is the embedding, and counts once even if a file holds both.
    """
    counted: Counter[str] = Counter()
    for name, header in headers.items():
        if not (tied and name == OUTPUT):
            counted[part_of(name)] += prod(header.shape)
    return counted
