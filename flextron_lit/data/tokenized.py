"""A domain's documents as tokens on disk: made once, keyed by content, tokenizer and settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.domain import TextDomain
from flextron_lit.data.texts import documents, fingerprint
from flextron_lit.progress import progress
from flextron_lit.sources import sha256_of
from flextron_lit.sources.cache import cached_folder, drop

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FORMAT = 2
"""Part of the key: raise it when what is written changes."""
BATCH = 64


@dataclass(frozen=True)
class TokenStream:
    """The documents of one split, one after the other, each closed by the end-of-text token."""

    tokens: np.ndarray
    """[tokens], memory-mapped."""
    starts: np.ndarray
    """[documents], where each begins, ascending from 0."""


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


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of a fast tokenizer with all its rules.

    Raises:
        ValueError: for a tokenizer that is not fast, or has no end-of-text token.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer; save it with tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, which closes every document; set one in its config")
    rules: str = tokenizer.backend_tokenizer.to_str()
    return hashlib.sha256(f"{rules}{tokenizer.eos_token_id}".encode()).hexdigest()


def tokenized(
    name: str, domain: TextDomain, tokenizer: PreTrainedTokenizerBase, *, held_out: float, seed: int
) -> TokenizedDomain:
    """The token streams of a domain, from the cache or made now.

    Raises:
        ValueError: if the domain holds no text, too few documents, or its tokens stay damaged on disk.
    """
    texts = documents(domain)
    settings = [FORMAT, fingerprint(texts), tokenizer_fingerprint(tokenizer), held_out, seed]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    for _ in range(2):
        folder = cached_folder("tokens", key, lambda target: _write(target, name, texts, tokenizer, held_out, seed))
        streams = _open(folder)
        if streams is not None:
            return TokenizedDomain(streams, key)
        rank_zero_info(f"the tokens of {name} in {folder} are damaged; making them again")
        drop(folder, unless=lambda entry: _open(entry) is not None)
    raise ValueError(f"the tokens of {name} in {folder} are damaged right after writing; is the disk full or failing?")


def _write(
    target: Path, name: str, texts: list[str], tokenizer: PreTrainedTokenizerBase, held_out: float, seed: int
) -> None:
    splits = split_documents(len(texts), held_out, seed)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    digests: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}
    for split, indices in splits.items():
        encoded = _encode([texts[i] for i in indices], tokenizer, f"tokenising {name} ({split})")
        lengths = [len(ids) for ids in encoded]
        counts[split] = {"documents": len(lengths), "tokens": sum(lengths)}
        np.concatenate(encoded).astype(dtype).tofile(target / f"{split}.tokens")
        np.cumsum([0, *lengths[:-1]], dtype=np.int64).tofile(target / f"{split}.starts")
        for kind in ("tokens", "starts"):
            digests[f"{split}.{kind}"] = sha256_of(target / f"{split}.{kind}")
    record: dict[str, Any] = {
        "dtype": np.dtype(dtype).name,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "counts": counts,
        "sha256": digests,
    }
    (target / "tokens.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, description: str) -> list[np.ndarray]:
    encoded = []
    batches = list(pairwise([*range(0, len(texts), BATCH), len(texts)]))
    # long documents are what we want: the tokenizer's warning about the model's length does not apply
    settings = {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
    for start, end in progress(batches, description):
        for ids in tokenizer(list(texts[start:end]), **settings)["input_ids"]:
            encoded.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int64))
    return encoded


def _open(folder: Path) -> dict[Split, TokenStream] | None:
    """Memory-map the streams; None if anything on disk is not what was written."""
    try:
        record = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
        if any(sha256_of(folder / name) != digest for name, digest in record["sha256"].items()):
            return None
        return {
            split: TokenStream(
                np.memmap(folder / f"{split}.tokens", dtype=record["dtype"], mode="r"),
                np.fromfile(folder / f"{split}.starts", dtype=np.int64),
            )
            for split in SPLITS
        }
    except (OSError, ValueError, KeyError):
        return None
