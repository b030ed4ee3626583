"""Text that a network writes itself: of all kinds that it knows, where calibration text is of a few (ours).

After LLM-QAT (Liu et al., 2023, arXiv 2305.17888), which distils from nothing else.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.files.ranks import tell

Blocks = dict[str, Tensor]
LENGTH = 128
"""Tokens of a text: many short ones are written side by side, in a fraction of the time of few long ones."""


@torch.no_grad()
def written(backbone: ElasticBackbone, tokens: int, block_size: int, *, seed: int = 0) -> Blocks:
    """Texts that begin with a random token each and go on as the full network's probabilities have it.

    Args:
        backbone: the dense network.
        tokens: how many, rounded up to whole blocks.
        block_size: tokens of a block, which holds as many texts as fit.
        seed: of the first tokens and of what is drawn.

    Returns:
        `input_ids` and `position_ids`, which begin anew with each text, [blocks, block_size].
    """
    length = block_size if block_size % LENGTH else LENGTH
    texts = -(-tokens // block_size) * (block_size // length)
    tell(f"writing {texts} texts of {length} tokens")
    model: Any = backbone.model
    own, model.generation_config = model.generation_config, GenerationConfig()
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices), backbone.evaluating():
        torch.manual_seed(seed)
        first = torch.randint(model.config.vocab_size, (texts, 1)).to(model.device)
        try:
            # a text goes on behind what would end an answer
            settings = {"do_sample": True, "top_k": 0, "max_new_tokens": length - 1, "pad_token_id": 0}
            ids = model.generate(first, attention_mask=torch.ones_like(first), **settings)
        finally:
            model.generation_config = own
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    return {name: each.reshape(-1, block_size) for name, each in (("input_ids", ids), ("position_ids", positions))}


def with_labels(blocks: Blocks) -> Blocks:
    """The same with what is to be predicted: every token, but for the first of each text (-100)."""
    ids, positions = blocks["input_ids"], blocks["position_ids"]
    return {**blocks, "labels": ids.masked_fill(positions == 0, -100)}
