"""Text for training and evaluation: domains, tokenised once or while read, packed, mixed, loaded resumably.

In reading order, as a text goes:

- `datamodule`: the whole of it, as Lightning asks for it
- `domain`: where the documents of a domain come from and how they are read
- `texts`: its documents one by one, from files, wheels, data sets, Python's own documentation or `tales`
- `cleaning`: what is left out of them, and what is said of it
- `compression`: files that are unpacked as they are read
- `formats`: from a file's bytes to documents, over `rows` where it has rows; `pieces` cuts one long text
- `document`: what a document is, text or conversation, and what is none
- `tokenized`: here text is tokenised, once: documents split, `encoding` into tokens, `streams` of them in the cache
- `packing`: blocks cut from a stream
- `loader`: which blocks come when, and going on where a run was left

Text of any size goes another way (`streaming` of the datamodule), which tokenises nothing beforehand:

- `on_the_fly`: its settings and the whole of it
- `corpus`: a domain as parts that are read where they lie: stretches of files, row groups, shards
- `lanes`: a fixed number of streams side by side that shuffle, split, tokenise and pack what they are dealt
- `lane_loader`: lanes shared out over ranks and workers, and going on where they were, on any number of both
"""

from typing import TYPE_CHECKING, Any

from flextron_lit.data.domain import TextDomain
from flextron_lit.data.loader import EpochSampler, ResumableLoader
from flextron_lit.data.on_the_fly import Streaming
from flextron_lit.data.packing import batches_of, first_tokens, text_blocks

if TYPE_CHECKING:
    from flextron_lit.data.datamodule import TextDataModule


def __getattr__(name: str) -> Any:
    """Import when asked for: who reads a file alone must not wait for Lightning."""
    if name != "TextDataModule":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flextron_lit.data.datamodule import TextDataModule

    return TextDataModule
