"""A trained surrogate and trained static routers, as a Flextron checkpoint holds them.

```
surrogate.safetensors     what predicts losses, the pairs it learned from, and the text they were measured on
routers/static-...        a router and its ladder
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from flextron_lit.costs.table import CostTable
from flextron_lit.files.damage import damage
from flextron_lit.routers.kept import Kept, KeptRouter
from flextron_lit.routers.ladder import Ladder
from flextron_lit.routers.pairs import Pairs
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.surrogate import Surrogate, Target, decode, encode
from flextron_lit.space import ElasticSpace

SURROGATE = "surrogate.safetensors"
META = "flextron"


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
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was trained, and how well it predicts; JSON-able."""

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
        tensors = {f"network.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"pairs.{name}": tensor for name, tensor in self.pairs.tensors().items()}
        tensors |= {f"text.{name}": tensor.to(torch.int32) for name, tensor in self.text.items()}
        about = {"target": self.target, "full_loss": self.full_loss, "settings": self.settings}
        return save({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, {META: json.dumps(about)})

    @classmethod
    def read(cls, folder: Path, space: ElasticSpace) -> TrainedSurrogate | None:
        """The surrogate of a Flextron checkpoint; None if it has none.

        Raises:
            ValueError: if the file is damaged, or belongs to another space.
        """
        path = folder / SURROGATE
        if not path.is_file():
            return None
        with damage(path, "train the surrogate again", what="is damaged, or of another space"):
            parts, about = _parts(path)
            hidden = parts["network"]["residual.0.weight"].shape[0]
            network = Surrogate(space, hidden, torch.Generator())
            network.load_state_dict(parts["network"])
            text = {name: tensor.long() for name, tensor in parts["text"].items()}
            pairs = Pairs.from_tensors(parts["pairs"])
            return cls(network, about["target"], about["full_loss"], pairs, text, about["settings"])


@dataclass(frozen=True)
class TrainedRouter(KeptRouter):
    """A static router, the cost table it belongs to, and its ladder."""

    kind: ClassVar[str] = "static"
    network: StaticRouter
    table: CostTable
    ladder: Ladder
    settings: dict[str, Any] = field(default_factory=dict)
    """How it was trained; JSON-able."""

    def answers(self) -> dict[str, Any]:
        """The ladder, and where its losses come from."""
        return {"losses": "measured" if self.ladder.measured else "predicted", "ladder": self.ladder.to_json()}

    @classmethod
    def made(
        cls, about: Mapping[str, Any], table: CostTable, weights: Mapping[str, Tensor], space: ElasticSpace
    ) -> TrainedRouter:
        """From what its files hold."""
        ladder = Ladder.from_json(about["ladder"], measured=about.get("losses") == "measured")
        for rung in ladder.rungs:
            space.check(rung.sub_network)
        network = StaticRouter(space, weights["layers.0.weight"].shape[0], torch.Generator())
        network.load_state_dict(weights)
        return cls(network, table, ladder, about["settings"])


def read_routers(folder: Path, space: ElasticSpace) -> list[TrainedRouter]:
    """The static routers of a Flextron checkpoint, each for a cost table of its own.

    Raises:
        ValueError: if a file is damaged, or belongs to another space.
    """
    return TrainedRouter.read_all(folder, space)


def _parts(path: Path) -> tuple[dict[str, dict[str, Tensor]], Mapping[str, Any]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    with safe_open(path, framework="pt") as file:
        return parts, json.loads(file.metadata()[META])
