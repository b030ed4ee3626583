"""What trained routers, static and dynamic, have in common as files of a Flextron checkpoint.

```
routers/<kind>-<cost>-<hash of its cost table>.json             the cost table, its answers, how it was trained
routers/<kind>-<cost>-<hash of its cost table>.safetensors      weights
```
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from safetensors.torch import load_file, save
from torch import Tensor, nn

from flextron_lit.costs.table import CostTable
from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.whole_file import json_text
from flextron_lit.space import ElasticSpace

FOLDER = "routers"
STALE = "stale_since"
"""In the settings: the first stage that changed the network after losses of it were measured or predicted."""


class Kept:
    """Something that a checkpoint keeps, and that knows the network's weights as they were; a dataclass."""

    settings: dict[str, Any]

    @property
    def stale(self) -> str | None:
        """The stage that changed the network since; None if none did."""
        return self.settings.get(STALE)

    def stale_since(self, stage: str) -> Self:
        """The same, marked."""
        changed: Any = self
        marked: Self = replace(changed, settings={STALE: stage, **self.settings})
        return marked


class KeptRouter(Kept, ABC):
    """A router, the cost table it belongs to, and its answers; a dataclass."""

    kind: ClassVar[str]
    """How the names of its files begin."""
    network: nn.Module
    table: CostTable

    @abstractmethod
    def answers(self) -> dict[str, Any]:
        """What it answers to budgets, JSON-able."""

    @classmethod
    @abstractmethod
    def made(
        cls, about: Mapping[str, Any], table: CostTable, weights: Mapping[str, Tensor], space: ElasticSpace
    ) -> Self:
        """From what its files hold."""

    @property
    def name(self) -> str:
        """Stem of its files: a checkpoint may hold routers for several devices."""
        return name_of(self.kind, self.table)

    def files(self) -> dict[str, bytes]:
        """Its files by their path in a Flextron checkpoint."""
        about = {
            "kind": self.kind,
            "table_sha256": self.table.sha256,
            "settings": self.settings,
            "table": self.table.to_json(),
            **self.answers(),
        }
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        return {
            f"{FOLDER}/{self.name}.json": json_text(about).encode(),
            f"{FOLDER}/{self.name}.safetensors": save(weights),
        }

    @classmethod
    def read(cls, path: Path, space: ElasticSpace) -> Self:
        """Read its JSON file, and the weights beside it.

        Raises:
            ValueError: if a file is damaged, or belongs to another space.
        """
        with damage(path, "train the router again", what="is damaged, or of another space"):
            about = read_json(path)
            table = CostTable.from_json(about["table"])
            table.check(space)
            if table.sha256 != about["table_sha256"]:
                raise ValueError("its cost table is not the one that it was trained on")
            return cls.made(about, table, load_file(path.with_suffix(".safetensors")), space)

    @classmethod
    def read_all(cls, folder: Path, space: ElasticSpace) -> list[Self]:
        """Those of a Flextron checkpoint, each for a cost table of its own.

        Raises:
            ValueError: if a file is damaged, or belongs to another space.
        """
        return [cls.read(path, space) for path in sorted((folder / FOLDER).glob(f"{cls.kind}-*.json"))]


def name_of(kind: str, table: CostTable) -> str:
    """Stem of the files of a router for a cost table."""
    return f"{kind}-{table.name}-{table.sha256[:8]}"
