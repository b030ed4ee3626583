"""Text of any size, tokenised while it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.corpus import corpus
from flextron_lit.data.document import Document
from flextron_lit.data.domain import TextDomain
from flextron_lit.data.encoding import Encoded, Ends, encode, refuse_unknown, template_fingerprint
from flextron_lit.data.lane_loader import LaneLoader
from flextron_lit.data.lanes import Lane, Reader, Reading, first_documents, restored
from flextron_lit.data.streams import Split, TokenStream
from flextron_lit.data.tokenized import TokenizedDomain
from flextron_lit.files.digest import sha256_of_json


@dataclass(frozen=True, kw_only=True)
class Streaming:
    """How text is read that is too much to tokenise before the first step.

    Documents come from all over the corpus, round after round: in a round each comes once. What is held out is said by
    the content of a document (a digest of it and the seed), so it is known without having counted them.
    """

    lanes: int = 24
    """Streams that are read side by side, each with its own parts of the corpus. Ranks and their workers share them
    evenly, so it is a multiple of ranks times workers; the order of blocks depends on it and on neither of those."""
    window: int = 256
    """Documents of a lane that are shuffled among each other, a million characters at most; parts are shuffled too."""
    epoch_tokens: int = 10**9
    """What an epoch is, since the text has no end: so many tokens of all ranks together; the text goes on behind it."""

    def __post_init__(self) -> None:
        if min(self.lanes, self.window, self.epoch_tokens) < 1:
            raise ValueError(
                f"streaming.lanes, window and epoch_tokens must be 1 or more, not {self.lanes}, {self.window}, "
                f"{self.epoch_tokens}"
            )


@dataclass(frozen=True)
class Encoding:
    """From documents to tokens, as for text that is tokenised once."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    ends: Ends
    vocab_size: int | None
    """What the network knows, where there may be tokens that it does not."""

    def __call__(self, documents: Sequence[Document]) -> list[Encoded]:
        """Tokens of documents.

        Raises:
            ValueError: if one cannot be read, or holds a token that the network does not know.
        """
        found = encode(documents, self.tokenizer, self.ends)
        if self.vocab_size is not None:
            ids = np.concatenate([each.ids for each in found])
            refuse_unknown(ids, self.tokenizer, self.vocab_size, f"domain {self.name}")
        return found


class OnTheFly:
    """The domains of a text, read as they come.

    Args:
        domains: by name.
        tokenizer: reads them.
        streaming: how they are read.
        held_out: share of the documents that are held out.
        seed: of what is held out, and of the order.
        special_tokens: let texts begin and end as the tokenizer has it.
        vocab_size: tokens that the network knows, to be heeded; None if there are no others.

    Raises:
        ValueError: if a domain has no text, or cannot be read as it says.
    """

    def __init__(
        self,
        domains: Mapping[str, TextDomain],
        tokenizer: PreTrainedTokenizerBase,
        streaming: Streaming,
        *,
        held_out: float,
        seed: int,
        special_tokens: bool,
        vocab_size: int | None,
    ) -> None:
        self.streaming = streaming
        self.weights = [domain.weight for domain in domains.values()]
        self.readings: dict[str, Reading] = {}
        self.keys: dict[str, str] = {}
        for name, domain in domains.items():
            chat = domain.format == "chat"
            ends = Ends.of(tokenizer) if special_tokens and not chat else Ends()
            found = corpus(domain, streaming.lanes)
            self.readings[name] = Reading(
                found,
                name,
                streaming.lanes,
                streaming.window,
                held_out,
                seed,
                Encoding(name, tokenizer, ends, vocab_size),
            )
            rules = [template_fingerprint(tokenizer)] if chat else [ends.prefix, ends.suffix]
            self.keys[name] = sha256_of_json(
                [found.fingerprint, rules, held_out, seed, domain.field_name, domain.clean]
            )

    def first(self, name: str, split: Split, tokens: int) -> TokenStream:
        """The first documents of a domain, from all over it; see `lanes.first_documents`."""
        return first_documents(self.readings[name], split, tokens)

    def held_out(self, name: str, tokens: Mapping[Split, int]) -> TokenizedDomain:
        """The documents of a domain to validate and test on, with so many tokens of each split.

        Raises:
            ValueError: as `first`.
        """
        streams = {split: self.first(name, split, max(1, tokens[split])) for split in tokens}
        return TokenizedDomain(streams, self.keys[name])

    def loader(
        self, tokenizer_key: str, *, block_size: int, batch_size: int, separate: bool, **sharing: int
    ) -> LaneLoader:
        """Training blocks of all domains, mixed by weight.

        Args:
            tokenizer_key: digest of the tokenizer.
            block_size: tokens of a block.
            batch_size: blocks of a batch, on each rank.
            separate: keep the documents of a block apart.
            sharing: `rank`, `world` and `num_workers`.

        Raises:
            ValueError: as `LaneLoader`.
        """
        rules = [tokenizer_key, self.keys, self.weights, asdict(self.streaming), block_size, separate]
        return LaneLoader(
            partial(self._lane, block_size=block_size, separate=separate),
            lanes=self.streaming.lanes,
            batch_size=batch_size,
            epoch_batches=max(1, self.streaming.epoch_tokens // (block_size * batch_size * sharing["world"])),
            key=sha256_of_json(rules),
            **sharing,
        )

    def _lane(self, number: int, state: dict[str, Any] | None, *, block_size: int, separate: bool) -> Lane:
        blocks, positions = restored(state, len(self.readings))
        readers = [
            Reader(reading, number, "train", position)
            for reading, position in zip(self.readings.values(), positions, strict=True)
        ]
        return Lane(
            readers,
            self.weights,
            number=number,
            lanes=self.streaming.lanes,
            block_size=block_size,
            separate=separate,
            blocks=blocks,
        )
