"""A trained dynamic router, as a Flextron checkpoint holds it.

```
routers/dynamic-<cost>-<hash of its cost table>.json             the cost table, the prices, how it was trained
routers/dynamic-<cost>-<hash of its cost table>.safetensors      weights
```
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from flextron_lit.costs.table import CostTable
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter
from flextron_lit.routers.pricing import Prices
from flextron_lit.routers.trained import FOLDER, STALE
from flextron_lit.space import ElasticSpace

DYNAMIC = "dynamic-"


@dataclass(frozen=True)
class TrainedDynamicRouter:
    """A dynamic router, the cost table it belongs to, and the prices of its budgets."""

    network: DynamicRouter
    table: CostTable
    prices: Prices
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was trained; JSON-able."""

    @property
    def name(self) -> str:
        """Stem of its files: a checkpoint may hold routers for several devices."""
        return f"{DYNAMIC}{self.table.name}-{self.table.sha256[:8]}"

    @property
    def stale(self) -> str | None:
        """The stage that changed the network since its prices were found; None if none did."""
        return self.settings.get(STALE)

    def stale_since(self, stage: str) -> TrainedDynamicRouter:
        """The same, marked."""
        return replace(self, settings={STALE: stage, **self.settings})

    def policy(
        self, budgets: Sequence[float], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DynamicPolicy:
        """What chooses for some budgets: one for all sequences, or one for each.

        Raises:
            ValueError: if a budget is below the lowest that can be met.
        """
        prices = [self.prices.at(budget) for budget in budgets]
        return DynamicPolicy(self.network, self.table, budgets, prices, device=device, dtype=dtype)

    def files(self) -> dict[str, bytes]:
        """Its files by their path in a Flextron checkpoint."""
        about = {
            "kind": "dynamic",
            "table_sha256": self.table.sha256,
            "settings": self.settings,
            "table": self.table.to_json(),
            "prices": self.prices.to_json(),
        }
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.network.state_dict().items()}
        return {
            f"{FOLDER}/{self.name}.json": (json.dumps(about, indent=1) + "\n").encode(),
            f"{FOLDER}/{self.name}.safetensors": save(weights),
        }

    @classmethod
    def read(cls, path: Path, space: ElasticSpace) -> TrainedDynamicRouter:
        """Read its JSON file, and the weights beside it.

        Raises:
            ValueError: if a file is damaged, or belongs to another space.
        """
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            table = CostTable.from_json(about["table"])
            table.check(space)
            if table.sha256 != about["table_sha256"]:
                raise ValueError("its cost table is not the one that it was trained on")
            weights = load_file(path.with_suffix(".safetensors"))
            network = DynamicRouter(space, weights["weight"].shape[-1], weights["budgets"])
            network.load_state_dict(weights)
            return cls(network, table, Prices.from_json(about["prices"]), about["settings"])
        except (ValueError, LookupError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged, or of another space ({error}); train the router again") from error


def read_dynamic_routers(folder: Path, space: ElasticSpace) -> list[TrainedDynamicRouter]:
    """The dynamic routers of a Flextron checkpoint, each for a cost table of its own.

    Raises:
        ValueError: if a file is damaged, or belongs to another space.
    """
    return [TrainedDynamicRouter.read(path, space) for path in sorted((folder / FOLDER).glob(f"{DYNAMIC}*.json"))]
