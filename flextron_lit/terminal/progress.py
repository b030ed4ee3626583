"""Progress of long work: a bar on a terminal, one line elsewhere."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import track
from transformers.utils import logging as transformers_logging

from flextron_lit.files.ranks import tell

T = TypeVar("T")


def progress(items: Sequence[T], description: str) -> Iterator[T]:
    """Go through items and show how far it is."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, description=description, console=console, transient=True)
    else:
        tell(description)
        yield from items


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep bars of loading and saving, which end in a moment, out of the log."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
