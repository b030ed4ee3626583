"""Which files of a model's folder or repository are wanted, by their names there."""

import shutil
from collections.abc import Iterable
from pathlib import Path

TERMS = tuple(
    f"{form}*"
    for word in ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
    for form in (word, word.title(), word.lower())
)
"""On what terms a model may be used."""
BESIDE_TOKENIZER = ("tokenizer.model", "*.jinja")
"""What other programs read of a tokenizer, and transformers does not write again."""
CHAT_TEMPLATE = "chat_template.jinja"
"""Which it does, if the tokenizer still has one."""
ADDITIONAL = "additional_chat_templates/*.jinja"
ON_THE_HUB = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    CHAT_TEMPLATE,
    "chat_template.json",
    ADDITIONAL,
    # of a Flextron checkpoint, format 1 included
    "flextron.json",
    "elastic/*",
    "costs/*",
    "routers/*",
    "order.safetensors",
    "surrogate.safetensors",
    *TERMS,
)
"""All that is read, or passed on: not what else lies in a repository, such as other formats of the same weights."""


def pass_on(source: str | Path | None, folder: Path, patterns: Iterable[str]) -> None:
    """Copy files of a model to what is made of it, where nothing of that name is.

    Args:
        source: a local folder; anything else has nothing.
        folder: target.
        patterns: of the files' paths.
    """
    if not source or not Path(source).is_dir():
        return
    for path in (path for pattern in patterns for path in Path(source).glob(pattern)):
        target = folder / path.relative_to(source)
        if path.is_file() and path.name != CHAT_TEMPLATE and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
