"""Several text domains for training and evaluation, as a LightningDataModule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from flextron_lit.data.domain import TextDomain, check_names, shown_names
from flextron_lit.data.encoding import refuse_unknown, refuse_unreadable, tokenizer_fingerprint
from flextron_lit.data.lane_loader import LaneLoader, demand_shares
from flextron_lit.data.loader import (
    BlockDataset,
    EpochSampler,
    ResumableLoader,
    Turns,
    batched,
    evenly,
    shares,
)
from flextron_lit.data.on_the_fly import OnTheFly, Streaming
from flextron_lit.data.packing import Block
from flextron_lit.data.streams import Split
from flextron_lit.data.tokenized import TokenizedDomain, tokenized
from flextron_lit.elastic.positions import demand_positions
from flextron_lit.losses.cross_entropy import IGNORED
from flextron_lit.sources import load_config, load_tokenizer


class TextDataModule(LightningDataModule):
    """Named text domains, mixed by weight, with held-out documents of each.

    Every batch has `input_ids`, `position_ids` and `labels`, [B, T]; of conversations (format `chat`) only the answers
    have labels. There is one validation and one test loader a domain, in the order of `domain_names`; where a domain
    has fewer blocks to evaluate on than there are ranks, the others get None in place of a batch.

    Args:
        domains: the domains by name.
        tokenizer: the model source whose tokenizer to use; the command line takes it from the stage's checkpoint.
        block_size: tokens of a block.
        batch_size: blocks of a batch, on each rank.
        validation_tokens: tokens to validate on, of each domain; with those of a conversation that are not predicted.
        test_tokens: tokens to test on, of each domain, counted likewise.
        held_out: share of the documents that are held out, half for validation and half for test.
        seed: of the split and of the order of blocks.
        num_workers: processes that load blocks; 0 loads in the main one, which is fast enough for memory-mapped tokens.
        streaming: read and tokenise text while training, for corpora too large to be tokenised before the first step;
            None tokenises it once, before. All domains are read so.
        separate_documents: let a document see itself alone, though a block holds several, and do not predict its first
            token; False: it sees what stands before it in the block, in training.
        special_tokens: let every text begin and end as the tokenizer has it, with a BOS, say; the end-of-text token
            closes it in any case, once. None: as the Flextron checkpoint was made that a stage starts from; of a dense
            model true. The checkpoint that a stage writes says it, and evaluation follows.

    Raises:
        ValueError: if a number is out of range, there is no domain, or a name is no text.
    """

    def __init__(
        self,
        domains: dict[str, TextDomain],
        tokenizer: str | None = None,
        block_size: int = 512,
        batch_size: int = 1,
        validation_tokens: int = 2048,
        test_tokens: int = 8192,
        held_out: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        special_tokens: bool | None = None,
        streaming: Streaming | None = None,
        separate_documents: bool = True,
    ) -> None:
        super().__init__()
        if not domains:
            raise ValueError("data.domains names no domain; a domain has at least a source")
        check_names(domains)
        if block_size < 2 or batch_size < 1 or num_workers < 0:
            raise ValueError(
                f"block_size must be 2 or more, batch_size 1 or more, num_workers 0 or more; "
                f"got {block_size}, {batch_size}, {num_workers}"
            )
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is a share between 0 and 1, not {held_out}")
        self.domains = domains
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.batch_size = batch_size
        self.tokens_of: dict[Split, int] = {"validation": validation_tokens, "test": test_tokens}
        self.held_out = held_out
        self.seed = seed
        self.num_workers = num_workers
        self.special_tokens = special_tokens
        self.block_sizes = {"data.init_args.block_size": block_size}
        """By the setting that says so."""
        self.streaming = streaming
        self.separate_documents = separate_documents
        self._tokenized: dict[str, TokenizedDomain] = {}
        self._on_the_fly: OnTheFly | None = None

    @property
    def domain_names(self) -> list[str]:
        """Names of the domains, in the order of the validation and test loaders."""
        return list(self.domains)

    @property
    def shown_names(self) -> list[str]:
        """The same as tables and logs call them."""
        return shown_names(self.domain_names)

    def note_blocks(self, name: str, options: Mapping[str, Any]) -> None:
        """Take note of how long the blocks are that a stage asks for, to refuse what its network cannot read.

        Args:
            name: of the options in a config.
            options: of the stage, nested.
        """
        for key, value in options.items():
            if key == "block_size":
                self.block_sizes[f"{name}.{key}"] = value
            elif isinstance(value, Mapping):
                self.note_blocks(f"{name}.{key}", value)

    def prepare_data(self) -> None:
        """Tokenise what the cache does not hold."""
        # kept, although other ranks will have to open the streams themselves: reading all texts again takes seconds
        self._tokenized = self._load()

    def setup(self, stage: str) -> None:
        """Open the token streams."""
        self._tokenized = self._tokenized or self._load()

    def _load(self) -> dict[str, TokenizedDomain]:
        if self.tokenizer is None:
            raise ValueError("data.tokenizer is not set; name the model source whose tokenizer to use")
        tokenizer, config = load_tokenizer(self.tokenizer), load_config(self.tokenizer)
        for name, size in self.block_sizes.items():
            demand_positions(config, size, f"{name} {size}", "lower it")
        doubtful = refuse_unreadable(tokenizer, config.vocab_size)
        self._tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)
        how: dict[str, Any] = {
            "held_out": self.held_out,
            "seed": self.seed,
            "special_tokens": self._with_special_tokens,
        }
        if self.streaming is not None:
            # before anything is read
            demand_shares(self.streaming.lanes, self._rank_and_world()[1], self.num_workers)
            self._on_the_fly = OnTheFly(
                self.domains, tokenizer, self.streaming, vocab_size=config.vocab_size if doubtful else None, **how
            )
            # what is validated and tested on is fixed, and little
            return {name: self._on_the_fly.held_out(name, self.tokens_of) for name in self.domains}
        found = {name: tokenized(name, domain, tokenizer, **how) for name, domain in self.domains.items()}
        for name, made in found.items() if doubtful else ():
            for stream in made.streams.values():
                refuse_unknown(stream.tokens, tokenizer, config.vocab_size, f"domain {name}")
        return found

    @property
    def _with_special_tokens(self) -> bool:
        return self.special_tokens is not False

    # --- loaders ------------------------------------------------------------------------------------------------

    def train_dataloader(
        self, *, block_size: int | None = None, batch_size: int | None = None
    ) -> ResumableLoader | LaneLoader:
        """Training blocks of all domains, mixed by weight.

        Args:
            block_size: tokens of a block; None means the datamodule's.
            batch_size: blocks of a batch; None means the datamodule's.

        Raises:
            ValueError: if there is less than one batch a rank.
        """
        batch_size = batch_size or self.batch_size
        rank, world = self._rank_and_world()
        if self._on_the_fly is not None:
            return self._on_the_fly.loader(
                self._tokenizer_fingerprint,
                block_size=block_size or self.block_size,
                batch_size=batch_size,
                separate=self.separate_documents,
                rank=rank,
                world=world,
                num_workers=self.num_workers,
            )
        dataset = self._dataset("train", self.domain_names, block_size, separate=self.separate_documents)
        weights = [domain.weight for domain in self.domains.values()]
        sampler = EpochSampler(dataset.sizes, weights, seed=self.seed, rank=rank, world=world)
        if len(sampler) < batch_size:
            raise ValueError(
                f"the training text has {len(dataset)} blocks of {dataset.block_size} tokens, fewer than the "
                f"{batch_size * world} of one step; add text, or lower block_size or batch_size"
            )
        return ResumableLoader(dataset, sampler=sampler, batch_size=batch_size, num_workers=self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Block]]:
        """One loader a domain."""
        return [self._evaluation_loader(name, "validation") for name in self.domains]

    def test_dataloader(self) -> list[DataLoader[Block]]:
        """One loader a domain."""
        return [self._evaluation_loader(name, "test") for name in self.domains]

    def predict_dataloader(self) -> list[DataLoader[Block]]:
        """The test documents."""
        return self.test_dataloader()

    def calibration_batches(
        self,
        tokens: int,
        domains: Sequence[str] | None = None,
        *,
        block_size: int | None = None,
        batch_size: int | None = None,
    ) -> list[Block]:
        """Training blocks to measure on, spread evenly over each domain; the same on every rank.

        Args:
            tokens: how many, rounded up to whole blocks, which the domains share by weight.
            domains: names of the domains to take them from; None means all.
            block_size: tokens of a block; None means that of training.
            batch_size: blocks of a batch; None means that of training.

        Raises:
            ValueError: if a domain does not exist or has too little text, or no tokens are asked for.
        """
        names = self.domain_names if domains is None else list(domains)
        unknown = sorted(set(names) - set(self.domains))
        if unknown:
            raise ValueError(f"there is no domain {unknown[0]!r}; there are {', '.join(self.domains)}")
        if tokens < 1:
            raise ValueError(f"calibration needs 1 token or more, not {tokens}")
        num_blocks = -(-tokens // (block_size or self.block_size))
        counts = shares(num_blocks, [self.domains[name].weight for name in names])
        blocks: list[Block] = []
        for name, count in zip(names, counts, strict=True):
            if not count:
                continue
            dataset = self._dataset("train", [name], block_size, blocks=count)
            size = len(dataset)
            if count > size:
                raise ValueError(
                    f"calibration on {tokens} tokens needs {count} blocks of domain {name}; it has {size}; "
                    "add text, or lower the tokens to calibrate or measure on"
                )
            blocks += [dataset[i] for i in evenly(size, count)]
        return [*batched(blocks, batch_size or self.batch_size)]

    def _evaluation_loader(self, name: str, split: Split) -> DataLoader[Block]:
        """Blocks spread evenly over the held-out stream, so that as many documents as possible are seen."""
        dataset = self._dataset(split, [name])
        count = self.tokens_of[split] // self.block_size
        if not 1 <= count <= len(dataset):
            raise ValueError(
                f"{split}_tokens {self.tokens_of[split]} makes {count} blocks of {self.block_size}; domain {name} has "
                f"{len(dataset)}: choose between {self.block_size} and {len(dataset) * self.block_size}"
            )
        chosen = evenly(len(dataset), count)
        if not any((dataset[i]["labels"] != IGNORED).any() for i in chosen):
            raise ValueError(
                f"the {count} {split} blocks of domain {name} hold no part of an answer: nothing to predict; "
                f"raise {split}_tokens or block_size"
            )
        rank, world = self._rank_and_world()
        return Turns(dataset, chosen, self.batch_size, rank, world).loader()

    def _dataset(
        self, split: Split, names: Sequence[str], block_size: int | None = None, *, blocks: int = 1, **how: bool
    ) -> BlockDataset:
        size = block_size or self.block_size
        if self._on_the_fly is not None and split == "train":
            streams = [self._on_the_fly.first(name, split, blocks * size) for name in names]
        else:
            streams = [self._tokenized[name].streams[split] for name in names]
        dataset = BlockDataset(streams, size, **how)
        for name, stream, size in zip(names, streams, dataset.sizes, strict=True):
            if not size:
                raise ValueError(
                    f"domain {name} has {len(stream.tokens)} {split} tokens, fewer than one block of "
                    f"{dataset.block_size}; add text, or lower block_size"
                )
        return dataset

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    # --- what is kept -------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What the text is, JSON-able, for a checkpoint's history."""
        return {
            "domains": {name: self._describe(name, domain) for name, domain in self.domains.items()},
            "tokenizer": self._tokenizer_fingerprint,
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "held_out": self.held_out,
            "seed": self.seed,
            "special_tokens": self._with_special_tokens,
            "separate_documents": self.separate_documents,
            "streaming": None if self.streaming is None else asdict(self.streaming),
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any], *, tokenizer: str, **settings: Any) -> TextDataModule:
        """The text that `describe` described, with the same documents held out.

        What it does not say was not done: an older program wrote it.

        Args:
            description: from a checkpoint's history.
            tokenizer: the model source whose tokenizer to use.
            settings: other arguments.

        Raises:
            ValueError: if the description lacks something.
        """
        names = {field.name for field in fields(TextDomain)}
        try:
            domains = {
                name: TextDomain(**{"clean": False} | {key: value for key, value in domain.items() if key in names})
                for name, domain in description["domains"].items()
            }
            same = {key: description[key] for key in ("block_size", "held_out", "seed")}
            same["special_tokens"] = bool(description.get("special_tokens", False))
            same["streaming"] = Streaming(**description["streaming"]) if description.get("streaming") else None
        except (KeyError, TypeError) as error:
            raise ValueError(f"the checkpoint does not say how its text was read ({error}); name a text") from error
        return cls(domains, tokenizer, **same, **settings)

    def _describe(self, name: str, domain: TextDomain) -> dict[str, Any]:
        # of text that is read on the fly, what was held out alone
        made = self._tokenized[name]
        described: dict[str, Any] = {
            **asdict(domain),
            "key": made.key,
            "tokens": {split: len(stream.tokens) for split, stream in made.streams.items()},
            "documents": {split: len(stream.starts) for split, stream in made.streams.items()},
        }
        if domain.format == "chat":
            described["answer_tokens"] = {split: stream.num_predicted for split, stream in made.streams.items()}
        return described
