"""Digests: of files, so that damage is noticed before it is used; of tokens, so that nothing is measured twice."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(content: Any) -> str:
    """Hexadecimal digest of what JSON can hold, and of the text of what it cannot; whatever the order of keys."""
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()


def fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Hexadecimal digest of integer tensors by name: of all tokens, say, and of which are predicted."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().long().contiguous().numpy().data)
    return digest.hexdigest()
