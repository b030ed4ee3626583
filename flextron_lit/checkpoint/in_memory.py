"""An elastic network in memory: from a checkpoint or a dense model, or with random weights where only time matters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flextron_lit import checkpoint
from flextron_lit.checkpoint import FlextronCheckpoint
from flextron_lit.checkpoint.weights import Weights
from flextron_lit.costs import Workload
from flextron_lit.data.encoding import refuse_unknown, refuse_unreadable
from flextron_lit.data.packing import FILE_BLOCK, batches_of, demand_tokens, first_tokens
from flextron_lit.data.streams import TokenStream
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.positions import readable
from flextron_lit.elastic.reconstruction import compensate
from flextron_lit.files.damage import damage
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.losses.measured_loss import Batch
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.routers.from_budget import ADAPTER, Answer, Budget, DynamicRouting, Routing
from flextron_lit.sources import load_dense, load_tokenizer, resolve_model
from flextron_lit.sources.stock import from_config, from_folder
from flextron_lit.space import ElasticSpace, SpaceConfig


@dataclass(frozen=True)
class Loaded:
    """What a source holds, and what answers budgets for it; `FlextronModel` is made of it."""

    backbone: ElasticBackbone
    tokenizer: PreTrainedTokenizerBase
    record: FlextronCheckpoint | None
    """What a Flextron checkpoint says beside its weights; None for a dense model."""
    folder: Path
    """Where it was read from."""
    _routings: dict[tuple[str | None, Workload, bool], Routing] = field(default_factory=dict, repr=False)

    @property
    def order(self) -> list[Tensor]:
        """Per block, the unit of the dense model that stands at each position, [units]."""
        return self.record.order if self.record else [torch.arange(block.full) for block in self.backbone.space.blocks]

    @cached_property
    def excess(self) -> ExcessTable | None:
        """What each block loses at each width, as conversion computed it; None if there is no such table for it.

        Raises:
            ValueError: if the file is damaged.
        """
        own = self.record is not None and self.record.space == self.backbone.space
        return ExcessTable.read(self.folder, self.backbone.space) if own else None

    @property
    def unchanged(self) -> bool:
        """Whether the weights in memory are those of the checkpoint, in the precision that they were loaded in."""
        live, kept = self.backbone.model.state_dict(), Weights(self.folder)
        own = checkpoint.read_compensation(self.folder, self.backbone.space) or [{}] * len(self.backbone.blocks)
        narrower = (
            named.keys() == (there := elastic.compensation.state_dict()).keys()
            and all(torch.equal(tensor.to(there[name]), there[name]) for name, tensor in named.items())
            for named, elastic in zip(own, self.backbone.blocks, strict=True)
        )
        full = (torch.equal(kept.tensor(name).to(live[name]), live[name]) for name in kept.headers)
        return all(full) and all(narrower)

    @property
    def history(self) -> list[dict[str, Any]]:
        """How it was made, a record for every stage; none for a dense model."""
        return self.record.history if self.record else []

    @property
    def text(self) -> dict[str, Any] | None:
        """The text that the last stage read which says so, as `TextDataModule.describe` wrote it; None if none does."""
        return text_of(self.history)

    @property
    def known_text(self) -> dict[str, Any]:
        """The same, where it is needed.

        Raises:
            ValueError: if the checkpoint does not say what it was trained on.
        """
        if self.text is None:
            raise ValueError("the checkpoint does not say what it was trained on; name a text with --text")
        return self.text

    @property
    def special_tokens(self) -> bool:
        """Whether texts begin and end as the tokenizer has it; a checkpoint that does not say it was made without."""
        return self.record is None or with_special_tokens(self.history)

    @property
    def prompts_begin(self) -> bool:
        """Whether a prompt begins as the tokenizer has it: so it does unless the checkpoint says that texts do not."""
        return bool((self.text or {}).get("special_tokens", True))

    def first_tokens(self, source: Path, tokens: int) -> TokenStream:
        """The first tokens of a text that a command line names: a file, a folder, or any other source of text.

        Args:
            source: of text, read as the ends of names say.
            tokens: how many; there may be fewer.

        Raises:
            ValueError: if it cannot be read, holds no text, or the network does not know one of its tokens.
        """
        vocab_size = self.backbone.model.config.vocab_size
        refuse_unreadable(self.tokenizer, vocab_size)
        stream = first_tokens(str(source), self.tokenizer, tokens, special_tokens=self.special_tokens)
        refuse_unknown(stream.tokens, self.tokenizer, vocab_size, str(source))
        return stream

    def batches_of(self, source: Path, tokens: int) -> list[Batch]:
        """The same in batches of a block, each as long as the network reads at once, or `FILE_BLOCK`.

        Raises:
            ValueError: as `first_tokens`, or if there are fewer tokens.
        """
        stream = self.first_tokens(source, tokens)
        demand_tokens(str(source), stream, tokens)
        return [*batches_of(stream, min(FILE_BLOCK, tokens, readable(self.backbone.model.config)))]

    def held_out(self, split: Literal["validation", "test"], tokens: int) -> dict[str, list[Batch]]:
        """So many tokens of those documents of the text that no weights were trained on: batches by domain.

        Raises:
            ValueError: as `known_text`, or if a domain has fewer.
        """
        sizes = {f"{split}_tokens": tokens}
        # needs Lightning, which takes seconds to import where no text is read
        from flextron_lit.data import TextDataModule

        data = TextDataModule.from_description(self.known_text, tokenizer=str(self.folder), **sizes)
        data.prepare_data()
        loaders = data.val_dataloader() if split == "validation" else data.test_dataloader()
        return {name: list(loader) for name, loader in zip(data.shown_names, loaders, strict=True)}

    def routing(self, latency: str | None = None, workload: Workload = Workload()) -> Routing:
        """What answers budgets: the routers and the surrogate of the checkpoint, read once.

        Args:
            latency: name of the latency table to use, of whatever device; None means the only one of this device.
            workload: what FLOPs, cache and memory are counted for, where no latency table says so.

        Raises:
            ValueError: if a file is damaged, or there are several latency tables or only another device's.
        """
        compiled = self.backbone.compiled is not None
        if (latency, workload, compiled) not in self._routings:
            tables, measured = known_tables(self.folder, self.backbone, workload, latency, compiled=compiled)
            may_miss = measured.may_miss if measured else {}
            routing = Routing.read(self.folder, self.backbone.space, tables, may_miss)
            self._routings[latency, workload, compiled] = routing
        return self._routings[latency, workload, compiled]

    def answer(self, budget: Budget, latency: str | None = None, workload: Workload = Workload()) -> Answer:
        """The sub-network for a budget.

        Args:
            budget: a ratio of the full network's cost (0.6), or as on the command line: `decode=12ms`, `90M`,
                `latency<=0.6,kv_bytes<=0.5`.
            latency: as in `routing`.
            workload: as in `routing`.

        Raises:
            ValueError: if it cannot be read or met, or the checkpoint has nothing to answer it with.
        """
        routing = self.routing(latency, workload)
        if self.backbone.adapted:
            routing = routing.stale_since(ADAPTER)
        answer = routing.answer(routing.parse(budget))
        if answer is None:
            raise ValueError(
                f"{self.folder} has no router, no surrogate and no excess losses to answer a budget with: convert the "
                "model (`convert`), train routers, or search with `select`"
            )
        return answer

    @cached_property
    def dynamic_routing(self) -> DynamicRouting:
        """The dynamic routers of the checkpoint, read once.

        Raises:
            ValueError: if there is none, or a file is damaged.
        """
        return DynamicRouting.read(self.folder, self.backbone.space)


def text_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What a history says last of the text that a stage read; None if it does not."""
    return next((row["data"] for row in reversed(history) if row.get("data")), None)


def with_special_tokens(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether texts began and ended as the tokenizer has it; not where the history does not say so."""
    return bool((text_of(history) or {}).get("special_tokens", False))


def load_elastic(
    source: str,
    space: SpaceConfig | None = None,
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Loaded:
    """Load weights and tokenizer, and make the model elastic.

    Args:
        source: a Flextron checkpoint, or a dense model in any notation.
        space: width choices; None means those of the checkpoint, or the defaults for a dense model.
        attn_implementation: `sdpa` or `eager`.
        dtype: of the weights in memory.
        device: where to put them.

    Raises:
        ValueError: if the source does not exist, is damaged, or cannot become elastic.
    """
    folder = resolve_model(source)
    record = None
    if checkpoint.is_flextron(folder):
        checkpoint.verify(folder)
        record = checkpoint.read(folder)
        _config(folder, record.space)
    model = load_dense(source, attn_implementation=attn_implementation, dtype=dtype)
    torch.nn.Module.to(model, device)
    backbone = ElasticBackbone(model, space or (record.space if record else None))
    own = checkpoint.read_compensation(folder, backbone.space) if record else None
    if own is not None:
        compensate(backbone, own)
    return Loaded(backbone, load_tokenizer(source), record, folder)


def blank_elastic(
    config: PreTrainedConfig,
    space: ElasticSpace,
    compensation: Sequence[Mapping[str, Tensor]] = (),
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> ElasticBackbone:
    """A network of the same shape with random weights: as fast, without a checkpoint's to read or to disturb.

    Args:
        config: of the full network.
        space: the choices.
        compensation: what narrower widths have of their own, which changes how they compute; a mapping a block.
        dtype: of the weights.
        device: where they are.
    """
    # measuring in the middle of a run must not change what the run draws next
    with torch.random.fork_rng(), torch.device(device):
        model = from_config(config, dtype=dtype, attn_implementation=config._attn_implementation)
    backbone = ElasticBackbone(model.eval(), space)
    if compensation:
        compensate(backbone, [dict(own) for own in compensation])
    return backbone


def shape_of(
    folder: Path, space: ElasticSpace, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "meta"
) -> ElasticBackbone:
    """The network of a Flextron checkpoint without its weights; for counting by default: nothing is allocated.

    Raises:
        ValueError: if a file is damaged.
    """
    config = _config(folder, space)
    config._attn_implementation = "sdpa"
    with damage(folder / checkpoint.CONFIG, checkpoint.MEND, signs=(Exception,)):
        counted = blank_elastic(config, space, dtype=dtype, device="meta")
    if str(device) == "meta":
        # what is counted does not depend on what narrower widths have of their own
        return counted
    return blank_elastic(config, space, checkpoint.read_compensation(folder, space) or (), dtype=dtype, device=device)


def _config(folder: Path, space: ElasticSpace) -> PreTrainedConfig:
    """As transformers reads it; of as many layers as the space has, before any are made."""
    with damage(folder / checkpoint.CONFIG, checkpoint.MEND, signs=(Exception,)):
        config: PreTrainedConfig = from_folder("config", folder)
        layers = len({block.layer for block in space.blocks})
        if config.num_hidden_layers != layers:
            raise ValueError(f"it has {config.num_hidden_layers} layers, the space {layers}")
    return config
