"""What goes into one call of generate: a prompt as tokens, and how many tokens there is room for."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron_lit.data.rows import decode

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
        prompt = decode("the prompt", sys.stdin.buffer.read()).rstrip("\n")
    elif file is not None:
        prompt = decode(str(file), file.read_bytes()).rstrip("\n")
    assert prompt is not None
    if not prompt.strip():
        raise ValueError("the prompt is empty; there is nothing to go on from")
    return prompt


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of a prompt, [1, T].

    Raises:
        ValueError: if it is to be a chat's first message and the tokenizer has no chat template.
    """
    if not chat:
        read = tokenizer(prompt, return_tensors="pt", verbose=False)
    elif tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: this is no chat model; leave --chat out")
    else:
        messages = [{"role": "user", "content": prompt}]
        read = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return {name: read[name] for name in ("input_ids", "attention_mask")}


def room(prompt_tokens: int, positions: int, wanted: int | None) -> int:
    """How many tokens to generate at most; what nobody asked for is cut to what the network can still read.

    Raises:
        ValueError: if prompt and answer are more than it reads at once.
    """
    left = positions - prompt_tokens
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
