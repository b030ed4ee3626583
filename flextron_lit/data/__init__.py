"""Text for training and evaluation: domains, tokenised once, packed, mixed, loaded resumably."""

from flextron_lit.data.datamodule import TextDataModule
from flextron_lit.data.domain import TextDomain
from flextron_lit.data.loader import EpochSampler, ResumableLoader
from flextron_lit.data.packing import file_batches, text_blocks

__all__ = ["EpochSampler", "ResumableLoader", "TextDataModule", "TextDomain", "file_batches", "text_blocks"]
