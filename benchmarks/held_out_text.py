"""Losses of sub-networks on the held-out test documents of the text that a checkpoint was trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.losses.measured_loss import Batch, MeasuredLoss, batches_of, loss_file
from flextron_lit.routers.trained import TrainedSurrogate

PRECISION = "bf16-mixed"


def measured_on(loaded: Loaded, batches: list[Batch]) -> MeasuredLoss:
    """Losses on some batches, kept in the cache; computed as the stages compute them on a CPU with bf16."""
    loaded.backbone.model.eval()
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    return MeasuredLoss(
        loaded.backbone, batches, file=loss_file(loaded.backbone, batches, PRECISION), forward_context=context
    )


def on_test_documents(loaded: Loaded, tokens: int) -> MeasuredLoss:
    """On so many tokens of each domain, which nothing was trained, sorted or routed by."""
    return measured_on(loaded, [batch for _, batches in test_text(loaded, tokens) for batch in batches])


def test_text(loaded: Loaded, tokens: int) -> Iterator[tuple[str, list[Batch]]]:
    """So many tokens of each domain by its name."""
    yield from loaded.held_out("test", tokens).items()


def prompts_of(loaded: Loaded, count: int, tokens: int) -> list[torch.Tensor]:
    """Starts of test documents' blocks, the domains in turn: int64 [1, tokens] each."""
    domains = [[batch["input_ids"] for batch in batches] for _, batches in test_text(loaded, 4096)]
    blocks = [block for turn in zip(*domains, strict=False) for block in turn]
    starts = range(0, blocks[0].shape[1] - tokens, tokens)
    return [block[:, start : start + tokens] for start in starts for block in blocks][:count]


def on_surrogate_text(loaded: Loaded, surrogate: TrainedSurrogate) -> MeasuredLoss:
    """On the tokens that the surrogate's pairs were measured on."""
    return measured_on(loaded, batches_of(surrogate.text, surrogate.settings["measure_batch_size"]))


def flextron_folders(folders: Iterable[Path]) -> list[Path]:
    """Run folders or checkpoints to checkpoints."""
    return [folder / "flextron" if (folder / "flextron").is_dir() else folder for folder in folders]
