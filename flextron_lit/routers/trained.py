"""A trained surrogate and trained routers, static and dynamic, as a Flextron checkpoint holds them.

```
elastic/surrogate.safetensors     what predicts losses, the pairs it learned from, and the text they were measured on
routers/<kind>-<cost>-<hash of its cost table>.json             the cost table, its answers, how it was trained
routers/<kind>-<cost>-<hash of its cost table>.safetensors      weights
```
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from flextron_lit.costs.table import CostTable
from flextron_lit.files.damage import damage, read_json
from flextron_lit.files.places import SURROGATE, file_of
from flextron_lit.files.whole_file import json_text
from flextron_lit.routers.budget_prices import Prices
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter
from flextron_lit.routers.ladder import Ladder
from flextron_lit.routers.pairs import Pairs
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.surrogate import TARGETS, Surrogate, Target, decode, encode
from flextron_lit.space import ElasticSpace

FOLDER = "routers"
META = "flextron"
TEXT = ("input_ids", "position_ids", "labels")
STALE = "stale_since"
"""In the settings: the first stage that changed the network after losses of it were measured or predicted."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kept:
    """Something that a checkpoint keeps, and that knows the network's weights as they were."""

    settings: dict[str, Any] = field(default_factory=dict, kw_only=True)
    """How it was trained, and how well it does; JSON-able."""

    @property
    def stale(self) -> str | None:
        """The stage that changed the network since; None if none did."""
        return self.settings.get(STALE)

    def stale_since(self, stage: str) -> Self:
        """The same, marked."""
        return replace(self, settings={STALE: stage, **self.settings})


@dataclass(frozen=True)
class TrainedSurrogate(Kept):
    """A surrogate with what it predicts, and what it learned from."""

    network: Surrogate
    target: Target
    full_loss: float
    """The full network's loss on the text, in nats per token."""
    pairs: Pairs
    text: dict[str, Tensor]
    """`input_ids`, `position_ids`, `labels` of all blocks that losses were measured on, [blocks, T]."""

    @torch.no_grad()
    def predict(self, one_hot: Tensor) -> Tensor:
        """Choices [..., 2L, N] to the target [...], without gradients."""
        return self.network(one_hot)

    def targets(self, losses: Tensor) -> Tensor:
        """What should be predicted for some losses."""
        return encode(self.target, losses, self.full_loss)

    def to_nats(self, predicted: Tensor) -> Tensor:
        """Predicted targets as losses in nats per token."""
        return decode(self.target, predicted, self.full_loss)

    def refuse_stale(self, folder: Path) -> None:
        """Refuse to train by what it says of a network that is no more.

        Raises:
            ValueError: if it is stale.
        """
        if self.stale:
            raise ValueError(
                f"the surrogate of {folder} is stale: {self.stale} changed the network after its losses were measured; "
                "run the surrogate stage again (configs/stages/surrogate.yaml)"
            )

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        parts = {"network": self.network.state_dict(), "pairs": self.pairs.tensors()}
        # token ids of half the size: vocabularies are far below 2^31
        parts["text"] = {name: tensor.to(torch.int32) for name, tensor in self.text.items()}
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        about = {"target": self.target, "full_loss": self.full_loss, "settings": self.settings}
        return save(_on_processor(tensors), {META: json.dumps(about)})

    @classmethod
    def read(cls, folder: Path, space: ElasticSpace) -> Self | None:
        """The surrogate of a Flextron checkpoint; None if it has none.

        Raises:
            ValueError: if the file is damaged, or belongs to another space.
        """
        path = file_of(folder, SURROGATE)
        if not path.is_file():
            return None
        with damage(path, "train the surrogate again", what="is damaged, or of another space"):
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()[META])
            parts: dict[str, dict[str, Tensor]] = {"network": {}, "pairs": {}, "text": {}}
            for name, tensor in load_file(path).items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
            network = Surrogate(space, len(parts["network"]["residual.0.weight"]), torch.Generator())
            network.load_state_dict(_numbers(parts["network"]))
            text = {name: parts["text"][name].long() for name in TEXT}
            pairs = Pairs.from_tensors(parts["pairs"])
            if pairs.choices.shape != (len(pairs), len(space)) or about["target"] not in TARGETS:
                raise ValueError(f"it has pairs {tuple(pairs.choices.shape)} and the target {about['target']!r}")
            full_loss = float(about["full_loss"])
            return cls(network, about["target"], full_loss, pairs, text, settings=dict(about["settings"]))


@dataclass(frozen=True)
class KeptRouter(Kept, ABC):
    """A router, the cost table it belongs to, and its answers."""

    kind: ClassVar[str]
    """How the names of its files begin."""
    network: nn.Module
    table: CostTable

    @abstractmethod
    def answers(self) -> dict[str, Any]:
        """What it answers to budgets, JSON-able."""

    @classmethod
    @abstractmethod
    def made(cls, about: Mapping[str, Any], table: CostTable, weights: Weights, space: ElasticSpace) -> Self:
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
        return {
            f"{FOLDER}/{self.name}.json": json_text(about).encode(),
            f"{FOLDER}/{self.name}.safetensors": save(_on_processor(self.network.state_dict())),
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
            return cls.made(about, table, _numbers(load_file(path.with_suffix(".safetensors"))), space)

    @classmethod
    def read_all(cls, folder: Path, space: ElasticSpace) -> list[Self]:
        """Those of a Flextron checkpoint, each for a cost table of its own.

        Raises:
            ValueError: if a file is damaged, or belongs to another space.
        """
        return [cls.read(path, space) for path in sorted((folder / FOLDER).glob(f"{cls.kind}-*.json"))]


@dataclass(frozen=True)
class TrainedRouter(KeptRouter):
    """A static router, the cost table it belongs to, and its ladder."""

    kind: ClassVar[str] = "static"
    network: StaticRouter
    ladder: Ladder

    def answers(self) -> dict[str, Any]:
        """The ladder, and where its losses come from."""
        return {"losses": "measured" if self.ladder.measured else "predicted", "ladder": self.ladder.to_json()}

    @classmethod
    def made(cls, about: Mapping[str, Any], table: CostTable, weights: Weights, space: ElasticSpace) -> Self:
        """From what its files hold."""
        ladder = Ladder.from_json(about["ladder"], measured=about.get("losses") == "measured")
        for rung in ladder.rungs:
            space.check(rung.sub_network)
        network = StaticRouter(space, len(weights["layers.0.weight"]), torch.Generator())
        network.load_state_dict(weights)
        return cls(network, table, ladder, settings=dict(about["settings"]))


@dataclass(frozen=True)
class TrainedDynamicRouter(KeptRouter):
    """A dynamic router, the cost table it belongs to, and the prices of its budgets."""

    kind: ClassVar[str] = "dynamic"
    network: DynamicRouter
    prices: Prices

    def policy(
        self, budgets: Sequence[float], *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DynamicPolicy:
        """What chooses for some budgets: one for all sequences, or one for each.

        Raises:
            ValueError: if a budget is below the lowest that can be met.
        """
        prices = [self.prices.at(budget) for budget in budgets]
        return DynamicPolicy(self.network, self.table, budgets, prices, device=device, dtype=dtype)

    def answers(self) -> dict[str, Any]:
        """The prices."""
        return {"prices": self.prices.to_json()}

    @classmethod
    def made(cls, about: Mapping[str, Any], table: CostTable, weights: Weights, space: ElasticSpace) -> Self:
        """From what its files hold."""
        network = DynamicRouter(space, weights["weight"].shape[-1], weights["budgets"])
        network.load_state_dict(weights)
        return cls(network, table, Prices.from_json(about["prices"]), settings=dict(about["settings"]))


def name_of(kind: str, table: CostTable) -> str:
    """Stem of the files of a router for a cost table."""
    return f"{kind}-{table.name}-{table.sha256[:8]}"


def _numbers(weights: Weights) -> Weights:
    """The same, where all of them are numbers."""
    wrong = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if wrong:
        raise ValueError(f"a weight of {wrong[0]} is no number")
    return weights


def _on_processor(tensors: Weights) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
