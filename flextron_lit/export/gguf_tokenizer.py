"""A byte-level BPE tokenizer in the terms of a GGUF file."""

import json
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
WORDS = BYTE_LEVEL | {"use_regex": True}
PIECES = BYTE_LEVEL | {"use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, PIECES]}


def _cased(numbers: str) -> str:
    """How Llama 3 and Qwen2 cut a text; they differ in how many digits stay together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


SINGLE_DIGITS = {"type": "Digits", "individual_digits": True}
KNOWN: dict[str, dict[str, Any]] = {
    "gpt-2": WORDS,
    "smollm": {"type": "Sequence", "pretokenizers": [SINGLE_DIGITS, WORDS]},
    "llama-bpe": _split(_cased(r"\p{N}{1,3}")),
    "qwen2": _split(_cased(r"\p{N}")),
}
"""How a tokenizer cuts a text into words before it merges, by the name that llama.cpp has for it: it knows no patterns,
only names."""
WHOLE_WORDS = ("llama-bpe",)
"""Those with which llama.cpp takes a word that is a token without merging (`ignore_merges`)."""


@dataclass(frozen=True)
class BytePairs:
    """What a GGUF file says of its tokenizer."""

    pre: str
    """Name of its pre-tokenizer."""
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    """Ids of the tokens that begin, end and pad a text, by `bos`, `eos` and `pad`."""
    begins: bool
    """Whether encoding puts the first of them in front."""
    chat_template: str | None

    def write(self, writer: GGUFWriter) -> None:
        """Add it to a file."""
        # what GGUF calls byte-level BPE
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, index in self.special.items():
            getattr(writer, f"add_{name}_token_id")(index)
        writer.add_add_bos_token(self.begins)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def byte_pairs(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> BytePairs:
    """Read a fast tokenizer.

    Args:
        tokenizer: the tokenizer.
        vocab_size: rows of the embedding; those beyond the tokenizer's tokens become unused ones.

    Raises:
        ValueError: if it is no byte-level BPE, or cuts text in a way that llama.cpp has no name for.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"no GGUF of {type(tokenizer).__name__}: it is no fast tokenizer; save it with tokenizer.json")
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    model = described["model"]
    pre = _pre_tokenizer(described)
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in described["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if max(tokens) >= vocab_size:
        raise ValueError(f"the tokenizer has a token {max(tokens)}, but the model only {vocab_size}")
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return BytePairs(
        pre=pre,
        tokens=[tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)],
        types=[int(types.get(index, TokenType.UNUSED)) for index in range(vocab_size)],
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        special={name: index for name, index in ids.items() if index is not None},
        begins=ids["bos"] is not None and tokenizer("a")["input_ids"][0] == ids["bos"],
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _pre_tokenizer(described: dict[str, Any]) -> str:
    """The name that llama.cpp has for how a tokenizer cuts text.

    Raises:
        ValueError: if there is none.
    """
    model = described["model"]
    found = json.loads(json.dumps(described["pre_tokenizer"]), object_hook=_without_offsets)
    name = next((name for name, known in KNOWN.items() if found == known), None)
    if model.get("byte_fallback"):
        raise ValueError(
            "no GGUF of this tokenizer: it is one of SentencePiece; take --format hf, beside whose weights the model's "
            "tokenizer.model lies, and llama.cpp's convert_hf_to_gguf.py (which needs: pip install sentencepiece)"
        )
    if model["type"] != "BPE" or name is None:
        raise ValueError(
            f"no GGUF of this tokenizer: it is a {model['type']} with the pre-tokenizer {json.dumps(found)}, and those "
            f"that can be written are byte-level BPE that cut text like {', '.join(KNOWN)}"
        )
    if bool(model.get("ignore_merges")) != (name in WHOLE_WORDS):
        raise ValueError(f"no GGUF of this tokenizer: its ignore_merges is not that of {name} in llama.cpp")
    return name


def _without_offsets(described: dict[str, Any]) -> dict[str, Any]:
    """Without `trim_offsets`, which changes no token."""
    return {name: value for name, value in described.items() if name != "trim_offsets"}
