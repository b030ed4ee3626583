"""The language loss of sub-networks on fixed text, measured forward only, and never twice."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.sharding import whole
from flextron_lit.files.cache_folder import cache_root
from flextron_lit.files.digest import fingerprint
from flextron_lit.files.whole_file import json_text
from flextron_lit.losses.by_chunk import Predictions, cross_entropy
from flextron_lit.space import SubNetwork
from flextron_lit.terminal.progress import progress

Batch = Mapping[str, Tensor]
INPUTS = ("input_ids", "position_ids")


class LossFile:
    """Losses by sub-network, a JSON line each: written as they come, so that a killed run has lost none.

    A last line that a kill cut off is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses = dict(_read(path)) if path.is_file() else {}

    def add(self, sub_network: SubNetwork, loss: float) -> None:
        """Note a loss, and write it down.

        Raises:
            ValueError: if the file cannot be written.
        """
        self.losses[sub_network] = loss
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_text({"sub_network": sub_network.to_json(), "loss": loss}, indent=None))
        except OSError as error:
            raise ValueError(f"cannot write measured losses to {self.path} ({error}); set FLEXTRON_CACHE") from error


def _read(path: Path) -> Iterable[tuple[SubNetwork, float]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            yield SubNetwork.from_json(row["sub_network"]), float(row["loss"])
        except (ValueError, LookupError, TypeError):
            # two processes that write at once, or a kill, leave at worst a line that is measured again
            continue


def batches_of(text: Mapping[str, Tensor], batch_size: int) -> list[Batch]:
    """Blocks [blocks, T] in batches of at most so many; the split is part of what a cached loss is kept under."""
    blocks = len(text["input_ids"])
    return [{k: v[i : i + batch_size] for k, v in text.items()} for i in range(0, blocks, batch_size)]


def loss_file(backbone: ElasticBackbone, batches: Sequence[Batch], precision: str) -> LossFile:
    """The cached losses of these weights on this text, under `<cache>/losses/`.

    Args:
        backbone: its weights, config, space, attention implementation and kind of device are part of the key.
        batches: so are the tokens.
        precision: and how the forward pass computes.
    """
    digest = hashlib.sha256()
    for name, parameter in backbone.model.named_parameters():
        digest.update(name.encode())
        # through bytes: numpy knows no bfloat16
        digest.update(whole(parameter.detach()).cpu().contiguous().view(torch.uint8).numpy().data)
    digest.update(fingerprint(batches).encode())
    config = {name: value for name, value in backbone.model.config.to_dict().items() if name != "_name_or_path"}
    attention, device = backbone.model.config._attn_implementation, backbone.model.device.type
    how = [precision, attention, device, torch.__version__, backbone.space.to_json(), config]
    digest.update(json.dumps(how, default=str, sort_keys=True).encode())
    return LossFile(cache_root() / "losses" / f"{digest.hexdigest()}.jsonl")


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Nats per token of a model as it is, token-weighted over batches as for `MeasuredLoss`."""
    total, count = 0.0, 0
    for batch in batches:
        inputs = {name: batch[name].to(model.device) for name in INPUTS if name in batch}
        loss, tokens = cross_entropy(Predictions.of(model, inputs), batch["labels"].to(model.device))
        total, count = total + loss.item(), count + int(tokens)
    return total / count


class MeasuredLoss:
    """Loss of a sub-network in nats per token, token-weighted over some batches.

    Args:
        backbone: the elastic network; put it on its device and in its mode first.
        batches: `input_ids`, `labels` and, for packed documents, `position_ids`: [B, T].
        file: where losses are looked up first and kept; None measures always.
        forward_context: around the forward passes, for example an autocast.
    """

    def __init__(
        self,
        backbone: ElasticBackbone,
        batches: Sequence[Batch],
        *,
        file: LossFile | None = None,
        forward_context: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        device = backbone.model.device
        self.backbone = backbone
        self.batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        self.file = file
        self.forward_context = forward_context

    def __call__(self, sub_network: SubNetwork) -> float:
        """Measure one, unless it is known."""
        if self.file is not None and sub_network in self.file.losses:
            return self.file.losses[sub_network]
        loss = self._measure(sub_network)
        if self.file is not None:
            self.file.add(sub_network, loss)
        return loss

    def known(self, sub_networks: Sequence[SubNetwork]) -> dict[SubNetwork, float]:
        """Those that need not be measured, with their losses."""
        losses = self.file.losses if self.file else {}
        return {each: losses[each] for each in sub_networks if each in losses}

    def all(self, sub_networks: Sequence[SubNetwork], description: str | None = None) -> list[float]:
        """Measure several, and show how far it is, if there is something to call it."""
        if description and sub_networks:
            return [self(sub_network) for sub_network in progress(sub_networks, description)]
        return [self(sub_network) for sub_network in sub_networks]

    def _measure(self, sub_network: SubNetwork) -> float:
        with self.backbone.use(sub_network), self.forward_context():
            return mean_loss(self.backbone.model, self.batches)
