"""A text domain: where its documents come from and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["text", "jsonl", "json"]


@dataclass(frozen=True, kw_only=True)
class TextDomain:
    """One named body of text, with held-out documents of its own."""

    source: str
    """Where the text is: a local file or folder, `hub:ORG/NAME`, `pypi:NAME==VERSION`, `python:` (Python's own
    documentation) or `generated:N,SEED` (N documents of made-up sentences)."""
    files: str = "**/*"
    """Which files of a folder or wheel, as a glob pattern."""
    format: Format = "text"
    """`text`: a file is a document. `jsonl`: a line is one. `json`: a file is one, of all long strings in it."""
    field: str = "text"
    """For `jsonl`: the key that holds the text."""
    min_characters: int = 200
    """For `json`: shorter strings are left out."""
    weight: float = 1.0
    """Share of the training blocks, relative to the other domains."""

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ValueError(f"a domain's weight must be above 0, not {self.weight}; leave the domain out instead")
        if self.min_characters < 1:
            raise ValueError(f"min_characters must be 1 or more, not {self.min_characters}")
