"""A domain's documents as tokens on disk: made once, keyed by content, tokenizer and settings."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.document import Document
from flextron_lit.data.domain import TextDomain
from flextron_lit.data.encoding import Ends, encode, template_fingerprint, tokenizer_fingerprint
from flextron_lit.data.pieces import CHARACTERS
from flextron_lit.data.streams import SPLITS, Split, TokenStream, append, open_streams, token_dtype, write_record
from flextron_lit.data.texts import Documents, documents
from flextron_lit.files.cache_folder import intact
from flextron_lit.files.digest import sha256_of_json
from flextron_lit.terminal.progress import progress

FORMAT = 3
"""Part of the key: raise it when what is written changes."""
BATCH_DOCUMENTS = 256
"""Tokenised at once: enough for every core to have several of them, and more were no faster."""
BATCH_CHARACTERS = 2**20
"""A batch of long documents ends early: a token at work takes 260 bytes of memory."""


@dataclass(frozen=True)
class TokenizedDomain:
    """Three streams and what is known of them."""

    streams: dict[Split, TokenStream]
    key: str


def split_documents(count: int, held_out: float, seed: int) -> dict[Split, list[int]]:
    """Indices of the documents of each split: at least one validation and one test document, drawn by the seed.

    Args:
        count: number of documents.
        held_out: share that is held out, half of it for validation and half for test.
        seed: of the draw.

    Raises:
        ValueError: if there are not enough documents.
    """
    each = max(1, round(count * held_out / 2))
    if count - 2 * each < 1:
        raise ValueError(f"{count} documents are too few to hold out {each} for validation and {each} for test")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return {
        "validation": sorted(order[:each]),
        "test": sorted(order[each : 2 * each]),
        "train": sorted(order[2 * each :]),
    }


def tokenized(
    name: str,
    domain: TextDomain,
    tokenizer: PreTrainedTokenizerBase,
    *,
    held_out: float,
    seed: int,
    special_tokens: bool = False,
) -> TokenizedDomain:
    """The token streams of a domain, from the cache or made now.

    Args:
        name: of the domain.
        domain: its documents.
        tokenizer: reads them.
        held_out: as in `split_documents`.
        seed: as in `split_documents`.
        special_tokens: let texts begin and end as the tokenizer has it. A chat template says that itself.

    Raises:
        ValueError: if the domain holds no text, too few documents, a tokenizer cannot read them, or the tokens stay
            damaged on disk.
    """
    rules: list[Any] = [tokenizer_fingerprint(tokenizer)]
    ends = Ends.of(tokenizer) if special_tokens and domain.format != "chat" else Ends()
    if domain.format == "chat":
        rules.append(template_fingerprint(tokenizer))
    elif ends != Ends():
        rules.append([ends.prefix, ends.suffix])
    texts = documents(domain)
    key = sha256_of_json([FORMAT, texts.fingerprint, *rules, held_out, seed])
    streams = intact(
        "tokens",
        key,
        lambda folder: _write(folder, name, texts, tokenizer, ends, held_out, seed),
        lambda folder: open_streams(folder, tokenizer),
    )
    if streams is None:
        raise ValueError(f"the tokens of {name} are damaged right after writing; is the disk full or failing?")
    return TokenizedDomain(streams, key)


def _write(
    target: Path,
    name: str,
    texts: Documents,
    tokenizer: PreTrainedTokenizerBase,
    ends: Ends,
    held_out: float,
    seed: int,
) -> None:
    """One pass over the documents, a batch of them in memory at a time."""
    try:
        splits = split_documents(len(texts), held_out, seed)
    except ValueError as error:
        how = f"a file that is a text by itself is cut every {CHARACTERS:,} characters; add text or files"
        raise ValueError(f"domain {name}: {error}: {how}") from error
    split_of = {index: split for split, indices in splits.items() for index in indices}
    dtype = token_dtype(tokenizer)
    # the splits are drawn before the first document is read: a document's number says where it goes
    numbers = count()
    ticks = progress(range(len(texts)), f"tokenising {name}")
    for batch in _batches(document for _, document in zip(ticks, texts, strict=True)):
        encoded = encode(batch, tokenizer, ends)
        of_batch = [split_of[next(numbers)] for _ in batch]
        for split in SPLITS:
            chosen = [document for document, its in zip(encoded, of_batch, strict=True) if its == split]
            if chosen:
                append(target, split, chosen, dtype)
    write_record(target, tokenizer)


def _batches(texts: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in texts:
        batch.append(document)
        characters += len(document)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
