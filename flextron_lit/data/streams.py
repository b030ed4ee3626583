"""Streams of tokens on disk: appended to batch by batch, opened by memory-mapping, checked against their record."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.encoding import Encoded
from flextron_lit.files.damage import read_json
from flextron_lit.files.digest import sha256_of
from flextron_lit.files.whole_file import write_json

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
RECORD = "tokens.json"


@dataclass(frozen=True)
class TokenStream:
    """The documents of one split, one after the other, each text closed by the end-of-text token."""

    tokens: np.ndarray
    """[tokens], memory-mapped."""
    starts: np.ndarray
    """[documents], where each begins, ascending from 0."""
    predicted: np.ndarray | None = None
    """[tokens], bool, memory-mapped: which tokens are to be predicted; None: all are."""

    @property
    def num_predicted(self) -> int:
        """How many tokens are to be predicted."""
        return len(self.tokens) if self.predicted is None else int(np.count_nonzero(self.predicted))


def append(folder: Path, split: Split, documents: Sequence[Encoded], dtype: np.dtype) -> None:
    """Write documents behind those that the files of a split already hold.

    Args:
        folder: where the files are.
        split: which ones.
        documents: one or more, all with `predicted` or all without.
        dtype: of a token on disk.
    """
    lengths = [len(document.ids) for document in documents]
    masks = [document.predicted for document in documents if document.predicted is not None]
    assert len(masks) in (0, len(documents)), "a stream has a mask or has none"
    assert all(len(mask) == length for mask, length in zip(masks, lengths, strict=False)), "one mask value a token"
    with (folder / f"{split}.tokens").open("ab") as file:
        first = file.tell() // dtype.itemsize
        file.write(np.concatenate([document.ids for document in documents]).astype(dtype).tobytes())
    with (folder / f"{split}.starts").open("ab") as file:
        file.write(np.cumsum([first, *lengths[:-1]], dtype=np.int64).tobytes())
    if masks:
        with (folder / f"{split}.predicted").open("ab") as file:
            file.write(np.concatenate(masks).astype(np.bool_).tobytes())


def write_record(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say what the files are, once they are complete."""
    write_json(folder / RECORD, _record(folder, tokenizer))


def open_streams(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[Split, TokenStream] | None:
    """Memory-map the streams; None if anything on disk, the record included, is not what was written."""
    try:
        if read_json(folder / RECORD) != _record(folder, tokenizer):
            return None
        return {split: _open(folder, split, token_dtype(tokenizer)) for split in SPLITS}
    except (OSError, ValueError):
        return None


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    """The smallest type on disk that holds every token."""
    # not their number: a vocabulary may have gaps
    return np.dtype(np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32)


def _record(folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    dtype = token_dtype(tokenizer)
    kinds = ("tokens", "starts", *(["predicted"] if any(folder.glob("*.predicted")) else []))
    paths = [folder / f"{split}.{kind}" for split in SPLITS for kind in kinds]
    sizes = {path.name: path.stat().st_size for path in paths}
    return {
        "dtype": dtype.name,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "counts": {
            split: {"documents": sizes[f"{split}.starts"] // 8, "tokens": sizes[f"{split}.tokens"] // dtype.itemsize}
            for split in SPLITS
        },
        "sha256": {path.name: sha256_of(path) for path in paths},
    }


def _open(folder: Path, split: Split, dtype: np.dtype) -> TokenStream:
    mask = folder / f"{split}.predicted"
    return TokenStream(
        np.memmap(folder / f"{split}.tokens", dtype=dtype, mode="r"),
        np.fromfile(folder / f"{split}.starts", dtype=np.int64),
        np.memmap(mask, dtype=np.bool_, mode="r") if mask.is_file() else None,
    )
