"""Blocks of equal length cut from a stream of documents."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.rows import decode
from flextron_lit.data.streams import TokenStream
from flextron_lit.losses.cross_entropy import IGNORED

Block = dict[str, Tensor]

FILE_BLOCK = 512
"""Tokens of a block of a file that a command line names."""


def block(stream: TokenStream, index: int, block_size: int) -> Block:
    """The tokens `index * block_size` and on.

    Positions restart with each document, from which transformers builds the mask that keeps documents apart (with
    `use_cache=False` and no attention mask), and the first token of a document is not predicted from the one before:
    the loss of a block is the loss of its pieces of documents on their own. Of a conversation the answers are
    predicted alone, and see all of it that is in the block.

    Returns:
        input_ids, position_ids, labels: [block_size] each, int64.
    """
    first = index * block_size
    tokens = torch.from_numpy(stream.tokens[first : first + block_size].astype(np.int64))
    offsets = np.arange(first, first + block_size)
    starts = stream.starts[np.searchsorted(stream.starts, offsets, side="right") - 1]
    positions = torch.from_numpy(offsets - np.maximum(starts, first))
    labels = tokens.masked_fill(positions == 0, IGNORED)
    if stream.predicted is not None:
        predicted = torch.from_numpy(np.array(stream.predicted[first : first + block_size]))
        labels = labels.masked_fill(~predicted, IGNORED)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def file_batches(path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[dict[str, Tensor]]:
    """The first tokens of a text file, a batch a block of `FILE_BLOCK` tokens, or of all if there are fewer.

    Raises:
        ValueError: as `text_blocks`.
    """
    blocks = text_blocks(path, tokenizer, block_size=min(FILE_BLOCK, tokens), tokens=tokens)
    return [{"input_ids": block[None], "labels": block[None]} for block in blocks]


def text_blocks(path: Path, tokenizer: PreTrainedTokenizerBase, *, block_size: int, tokens: int) -> Tensor:
    """The first tokens of a text file in contiguous blocks, without document structure.

    Returns:
        [tokens // block_size, block_size].

    Raises:
        ValueError: if the file has fewer tokens, they make no block, or it is not UTF-8.
    """
    if tokens < block_size:
        raise ValueError(f"{tokens} tokens make no block of {block_size}; ask for {block_size} or more")
    text = decode(str(path), path.read_bytes())
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"{path} has {len(ids)} tokens, fewer than the {tokens} asked for")
    return torch.tensor(ids[: tokens // block_size * block_size]).view(-1, block_size)
