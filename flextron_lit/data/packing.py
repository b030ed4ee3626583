"""Blocks of equal length cut from a stream of documents."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.cleaning import Seen
from flextron_lit.data.domain import TextDomain
from flextron_lit.data.encoding import Ends
from flextron_lit.data.streams import TokenStream
from flextron_lit.data.texts import read, tell_seen
from flextron_lit.elastic.positions import readable
from flextron_lit.losses.cross_entropy import IGNORED
from flextron_lit.sources import load_config

Block = dict[str, Tensor]

FILE_BLOCK = 512
"""Most tokens of a block of a text that a command line names."""


def block(stream: TokenStream, index: int, block_size: int, *, separate: bool = True) -> Block:
    """The tokens `index * block_size` and on.

    Positions restart with each document, from which transformers builds the mask that keeps documents apart (with
    `use_cache=False` and no attention mask), and the first token of a document is not predicted from the one before:
    the loss of a block is the loss of its pieces of documents on their own. Of a conversation the answers are
    predicted alone, and see all of it that is in the block. Where documents are not kept separate, each sees what
    stands before it in the block, and its first token is predicted from that.

    Returns:
        input_ids, position_ids, labels: [block_size] each, int64.
    """
    first = index * block_size
    tokens = torch.from_numpy(stream.tokens[first : first + block_size].astype(np.int64))
    offsets = np.arange(first, first + block_size)
    starts = stream.starts[np.searchsorted(stream.starts, offsets, side="right") - 1] if separate else np.zeros(1, int)
    positions = torch.from_numpy(offsets - np.maximum(starts, first))
    labels = tokens.masked_fill(positions == 0, IGNORED)
    if stream.predicted is not None:
        predicted = torch.from_numpy(np.array(stream.predicted[first : first + block_size]))
        labels = labels.masked_fill(~predicted, IGNORED)
    return {"input_ids": tokens, "position_ids": positions, "labels": labels}


def longest_block(source: str) -> int:
    """Tokens of a block that the model of a source reads at once, at most `FILE_BLOCK`.

    Raises:
        ValueError: as `load_config`.
    """
    return min(FILE_BLOCK, readable(load_config(source)))


def batches_of(stream: TokenStream, block_size: int) -> list[Block]:
    """All whole blocks of a stream, a batch each; of one document without positions, since nothing is packed."""
    blocks = [block(stream, index, block_size) for index in range(len(stream.tokens) // block_size)]
    if len(stream.starts) == 1:
        blocks = [{"input_ids": each["input_ids"], "labels": each["input_ids"]} for each in blocks]
    return [{name: tensor[None] for name, tensor in each.items()} for each in blocks]


def first_tokens(
    source: str, tokenizer: PreTrainedTokenizerBase, tokens: int, *, special_tokens: bool = False
) -> TokenStream:
    """The first tokens of a source, document by document as in training; nothing closes the last one.

    Args:
        source: a file, a folder or any other source of text, read as the ends of names say.
        tokenizer: reads it.
        tokens: how many; there may be fewer.
        special_tokens: let every text begin and end as the tokenizer has it.

    Raises:
        ValueError: if the source cannot be read, or holds no text.
    """
    domain, seen, ends = TextDomain(source=source), Seen(), Ends.of(tokenizer) if special_tokens else Ends()
    found: list[int] = []
    starts: list[int] = []
    for document in read(domain, seen, whole=True):
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        starts.append(len(found))
        found += ends.around(ids, tokenizer.eos_token_id)
        if len(found) >= tokens:
            break
    tell_seen(domain, seen, len(starts))
    found[starts[-1] :] = ends.around(ids, None)
    return TokenStream(np.array(found[:tokens]), np.array(starts))


def demand_tokens(source: str, stream: TokenStream, tokens: int) -> None:
    """Refuse a text that is too short.

    Raises:
        ValueError: with how long it is.
    """
    if len(stream.tokens) < tokens:
        raise ValueError(
            f"{source} has {len(stream.tokens)} tokens, fewer than the {tokens} asked for; add text, or ask for fewer"
        )


def text_blocks(path: Path, tokenizer: PreTrainedTokenizerBase, *, block_size: int, tokens: int) -> Tensor:
    """The first tokens of a text in contiguous blocks, whatever documents it has.

    Returns:
        [tokens // block_size, block_size].

    Raises:
        ValueError: if they make no block, there are fewer, or as `first_tokens`.
    """
    if tokens < block_size:
        raise ValueError(f"{tokens} tokens make no block of {block_size}; ask for {block_size} or more")
    stream = first_tokens(str(path), tokenizer, tokens)
    demand_tokens(str(path), stream, tokens)
    return torch.from_numpy(stream.tokens[: tokens // block_size * block_size]).view(-1, block_size)
