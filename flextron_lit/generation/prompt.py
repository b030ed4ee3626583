"""What goes into one call of generate: a prompt as tokens, and how many tokens there is room for."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flextron_lit.data.encoding import Ends, refuse_unknown
from flextron_lit.data.rows import MARK, decode
from flextron_lit.elastic.positions import demand_positions, is_bounded, readable

NEW_TOKENS = 100
STDIN = "-"
Inputs = Mapping[str, Any]
"""`input_ids` and `attention_mask` of one prompt, [1, T]."""


def prompt_of(prompt: str | None, file: Path | None) -> str:
    """The prompt that a command line names; a line break that ends a file or standard input is no part of it.

    Raises:
        ValueError: if there is none, or it is not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise ValueError("name the prompt with either --prompt or --prompt_file")
    if STDIN in (prompt, str(file)):
        prompt = _text("the prompt", sys.stdin.buffer.read())
    elif file is not None:
        prompt = _text(str(file), file.read_bytes())
    assert prompt is not None
    if not prompt.strip():
        raise ValueError("the prompt is empty; there is nothing to go on from")
    return prompt


def _text(place: str, content: bytes) -> str:
    """What a file holds, as texts are read: without byte order mark, and with plain line ends."""
    return decode(place, content).removeprefix(MARK).replace("\r\n", "\n").rstrip("\n")


def encoded(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    prompt: str,
    *,
    chat: bool,
    special_tokens: bool = True,
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a prompt, [1, T]: it begins as the tokenizer has it, once, and ends open.

    Args:
        tokenizer: reads it.
        config: of the network.
        prompt: what to go on from.
        chat: it is a user's message, which the chat template says all about.
        special_tokens: False where texts of the network begin without.

    Raises:
        ValueError: if there is no chat template, or the network does not know one of the tokens.
    """
    if chat:
        return conversation(tokenizer, config, [{"role": "user", "content": prompt}])
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    found = torch.tensor([(Ends.of(tokenizer) if special_tokens else Ends()).begun(ids)])
    refuse_unknown(found[0].tolist(), tokenizer, config.vocab_size, "the prompt")
    return {"input_ids": found, "attention_mask": torch.ones_like(found)}


def conversation(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, messages: Sequence[Mapping[str, str]]
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a conversation, [1, T], as its chat template has it, an answer begun.

    Args:
        tokenizer: holds the template.
        config: of the network.
        messages: each with a `role` and a `content`.

    Raises:
        ValueError: if there is no chat template, or the network does not know one of the tokens.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: this is no chat model; leave --chat out")
    read: Any = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    refuse_unknown(read["input_ids"][0].tolist(), tokenizer, config.vocab_size, "the prompt")
    return {name: read[name] for name in ("input_ids", "attention_mask")}


def room(prompt_tokens: int, config: PreTrainedConfig, wanted: int | None) -> int:
    """How many tokens to generate at most; what nobody asked for is cut to what the network can still read.

    Where positions are rotations, more than it was made for is told.

    Args:
        prompt_tokens: of the prompt.
        config: of the network.
        wanted: how many are asked for.

    Raises:
        ValueError: if prompt and answer are more than it has positions.
    """
    positions = readable(config)
    left = positions - prompt_tokens
    if not is_bounded(config):
        fitting = min(NEW_TOKENS, left) if left > 0 else NEW_TOKENS
        most = fitting if wanted is None else wanted
        demand_positions(config, prompt_tokens + most, "prompt plus answer", "")
        return most
    if left < 1:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens, but the network reads {positions} at once, the answer included; "
            "shorten the prompt"
        )
    if wanted is not None and wanted > left:
        raise ValueError(
            f"the prompt has {prompt_tokens} tokens and --max_new_tokens asks for {wanted} more, but the network reads "
            f"{positions} at once; ask for {left}, or shorten the prompt"
        )
    return min(NEW_TOKENS, left) if wanted is None else wanted
