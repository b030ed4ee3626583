"""Loss of sub-networks on one text file in plain contiguous blocks, as perplexities are usually reported."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flextron_lit.data import text_blocks
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.cross_entropy import cross_entropy
from flextron_lit.sources import load_tokenizer
from flextron_lit.space import SubNetwork
from flextron_lit.terminal.progress import progress


def blocks_of(path: Path, checkpoint: str, *, tokens: int, block_size: int) -> Tensor:
    """The first tokens of a text file, [n, block_size]."""
    return text_blocks(path, load_tokenizer(checkpoint), block_size=block_size, tokens=tokens)


@torch.no_grad()
def loss_on(backbone: ElasticBackbone, sub_network: SubNetwork, blocks: Tensor, name: str) -> float:
    """Nats per token."""
    total, tokens = 0.0, 0
    with backbone.use(sub_network):
        for block in progress(blocks, name):
            logits = backbone.model(block[None], use_cache=False).logits
            loss, count = cross_entropy(logits, block[None])
            total, tokens = total + loss.item(), tokens + int(count)
    return total / tokens
