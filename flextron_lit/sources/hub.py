"""Repositories of the Hugging Face Hub, as local folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download

from flextron_lit.sources.notation import Source


def fetch_snapshot(
    source: Source, *, repo_type: Literal["model", "dataset"] = "model", allow_patterns: Sequence[str] | None = None
) -> Path:
    """The files of a hub source, from the Hub's own cache or its servers.

    Args:
        source: the repository and its revision.
        repo_type: what sort of repository it is.
        allow_patterns: of the files to fetch; None means all.

    Raises:
        ValueError: if it cannot be fetched.
    """
    try:
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            repo_type=repo_type,
            allow_patterns=None if allow_patterns is None else [*allow_patterns],
        )
    except Exception as error:
        # no network, no such repository, no permission: each its own type, all the user's to mend
        raise ValueError(
            f"there is no local folder {source.location}, and it cannot be fetched from the Hub as a {repo_type}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Path(folder)
