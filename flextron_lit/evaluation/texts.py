"""What losses are measured on: the test documents of the training text, or files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.data.domain import shown_names
from flextron_lit.evaluation.document_losses import Batch

TOKENS = 8192
Texts = dict[str, list[Batch]]
"""Batches by the name of the domain or file."""


def texts_of(loaded: Loaded, files: Sequence[Path], tokens: int | None) -> Texts:
    """The files that are named, or else test documents of every domain.

    Args:
        loaded: whose text, and whose tokenizer.
        files: files, folders or other sources of text; none means the test documents.
        tokens: of each; None means `TOKENS`, or what the smallest domain has.

    Raises:
        ValueError: if there is too little text, two files have the same name, or nothing says what the text was.
    """
    if not files:
        # what nothing was trained, sorted or routed by
        return loaded.held_out("test", _fitting(loaded.known_text) if tokens is None else tokens)
    found: Texts = {}
    for path in files:
        if path.name in found:
            raise ValueError(f"two texts are called {path.name}; results go by that name, so rename one")
        # contiguous blocks, of which each piece of a document counts as one
        found[path.name] = loaded.batches_of(path, TOKENS if tokens is None else tokens)
    return dict(zip(shown_names(list(found)), found.values(), strict=True))


def _fitting(described: Mapping[str, Any]) -> int:
    """As many tokens as all domains have whole blocks of, up to `TOKENS`."""
    there = [domain.get("tokens", {}).get("test", TOKENS) for domain in described.get("domains", {}).values()]
    block_size = described["block_size"]
    return max(block_size, min([TOKENS, *there]) // block_size * block_size)
