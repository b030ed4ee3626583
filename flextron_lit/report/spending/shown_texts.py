"""Texts to look at: a file's beginning, or validation documents of every training domain."""

import math
from pathlib import Path

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.data import batches_of
from flextron_lit.elastic.positions import readable
from flextron_lit.report.spending.routed_text import Batch

TOKENS = 400


def texts_of(loaded: Loaded, text: Path | None, tokens: int | None) -> dict[str, list[Batch]]:
    """What to look at, by name: the beginning of a text file, or validation documents of every training domain.

    Args:
        loaded: the network.
        text: the file, or any other source of text.
        tokens: how many; of each domain as many, rounded up to whole blocks.

    Raises:
        ValueError: if there is no text, more is asked for than the network can read at once, or the checkpoint does
            not say what it was trained on.
    """
    longest = readable(loaded.backbone.model.config)
    tokens = min(TOKENS, longest) if tokens is None else tokens
    if not 2 <= tokens <= longest:
        raise ValueError(f"the network reads 2 to {longest} tokens at once, not {tokens}; change --tokens")
    if text is not None:
        stream = loaded.first_tokens(text, tokens)
        if len(stream.tokens) < 2:
            raise ValueError(
                f"{text} has {len(stream.tokens)} tokens; one follows from another, so 2 or more are needed"
            )
        return {text.name: [*batches_of(stream, len(stream.tokens))]}
    block_size = loaded.known_text["block_size"]
    return loaded.held_out("validation", math.ceil(tokens / block_size) * block_size)
