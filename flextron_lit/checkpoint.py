"""The Flextron checkpoint: the folder that every stage reads and writes.

```
config.json, model.safetensors, tokenizer files    a plain Hugging Face checkpoint of the full network
flextron.json                                      format version, space, history
order.safetensors                                  per block, where the units stood in the dense model
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.progress import quiet_transformers
from flextron_lit.space import ElasticSpace

FORMAT_VERSION = 1
RECORD = "flextron.json"
ORDER = "order.safetensors"


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """One line of a checkpoint's history: how it was made."""

    stage: str
    """Name of the stage's class."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Training tokens seen, over all ranks; a token counts once however many sub-networks trained on it."""
    seed: int | None
    """Seed of the run."""
    source: str
    """The checkpoint or dense model that the stage started from."""
    data: dict[str, Any]
    """What the datamodule says of itself."""
    settings: dict[str, Any]
    """The stage's own arguments."""
    calibration: dict[str, Any] | None
    """How importance was measured, if this stage sorted the weights."""
    versions: dict[str, str]
    """Of Python and the packages that matter."""
    git_commit: str | None
    """Commit of this project, when run from a checkout."""


@dataclass(frozen=True)
class FlextronCheckpoint:
    """What `flextron.json` and `order.safetensors` say; the weights are read by transformers."""

    space: ElasticSpace
    order: list[Tensor]
    history: list[dict[str, Any]]


def is_flextron(folder: Path) -> bool:
    """Whether a folder is a Flextron checkpoint rather than a dense model."""
    return (folder / RECORD).is_file()


def read(folder: Path) -> FlextronCheckpoint:
    """Read everything but the weights.

    Raises:
        ValueError: if the folder is no Flextron checkpoint, or was written by a newer version, or is damaged.
    """
    if not is_flextron(folder):
        raise ValueError(f"{folder} is no Flextron checkpoint: it has no {RECORD}")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        version = record["format_version"]
        if version > FORMAT_VERSION:
            raise ValueError(f"{folder} has format {version}, this program reads up to {FORMAT_VERSION}: upgrade it")
        space = ElasticSpace.from_json(record["space"])
        order = load_file(folder / ORDER)
        return FlextronCheckpoint(space, [order[block.name].long() for block in space.blocks], record["history"])
    except (KeyError, TypeError, OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {error}); restore or retrain it") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise ValueError(f"{folder / ORDER} is damaged ({error}); restore or retrain it") from error


def write(
    folder: Path,
    backbone: ElasticBackbone,
    tokenizer: PreTrainedTokenizerBase,
    *,
    order: Sequence[Tensor],
    history: Sequence[Mapping[str, Any] | StageRecord],
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the folder whole or not at all: a sibling is filled, then renamed into place.

    Args:
        folder: target; an existing one is replaced.
        backbone: the elastic network; its full weights are written.
        tokenizer: its tokenizer.
        order: per block, the unit of the dense model that now stands at each position.
        history: records of all stages so far.
        state_dict: full weights, where the live parameters are sharded.
    """
    partial, old = _sibling(folder, "partial"), _sibling(folder, "old")
    recover(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with quiet_transformers():
            backbone.model.save_pretrained(partial, state_dict=dict(state_dict) if state_dict else None)
        tokenizer.save_pretrained(partial)
        named = {b.name: o.to(torch.int32).contiguous() for b, o in zip(backbone.space.blocks, order, strict=True)}
        save_file(named, partial / ORDER)
        rows = [asdict(r) if isinstance(r, StageRecord) else dict(r) for r in history]
        record = {"format_version": FORMAT_VERSION, "space": backbone.space.to_json(), "history": rows}
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    with suppress(FileNotFoundError):
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish a replacement that was cut off: bring the old folder back if the new one did not arrive."""
    old = _sibling(folder, "old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}.{suffix}")
