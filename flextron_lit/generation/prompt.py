"""What goes into one call of generate: a prompt as tokens, and how many tokens there is room for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 100
Inputs = Mapping[str, Any]
"""`input_ids` and `attention_mask` of one prompt, [1, T]."""


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
