"""How the state of an unfinished run reaches the disk, and is found there again."""

import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.tensor import DTensor

from flextron_lit.files.damage import damage
from flextron_lit.files.whole_file import whole_file
from flextron_lit.files.whole_folder import free_space

RANKS = "ranks"
"""In the state of a run whose network is shared out: how many processes there were, and which files are theirs."""
BLOCKS = "blocks"
"""In every state: how many blocks one batch of all processes has."""
MEND = "start anew with --fresh"
ROWS = "rows of"
"""Marks what a process holds of a tensor: the size of its first dimension as a whole."""


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint straight to a sibling file and renames it.

    Lightning's own builds the whole file in memory first: 3 GB more for a 135M-parameter model with AdamW.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the file whole or not at all.

        Raises:
            ValueError: if it cannot be written, for example because the disk is full; an earlier one stays.
        """
        assert storage_options is None
        try:
            with whole_file(Path(path)) as partial, partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            # torch's writer says of a full disk only that it stands at another position than it should
            free = free_space(Path(path))
            raise ValueError(
                f"cannot save the state of the run in {path} ({error}); {free:.0f} MB are free there. "
                "The earlier state stays: make room, then run the same command again"
            ) from error

    def load_checkpoint(self, path: Any, *args: Any, **settings: Any) -> dict[str, Any]:
        """As Lightning's, of a file that is as it was written.

        Raises:
            ValueError: if it is damaged.
        """
        verify(Path(path))
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **settings)
        return loaded


def verify(path: Path) -> None:
    """Compare all of a state's file with the CRC-32 that it has of each tensor: seconds per GB.

    torch looks at none of them: a bit that a disk has turned over would be a weight.

    Raises:
        ValueError: if it is damaged or not there.
    """
    with damage(path, MEND, signs=(Exception,)), zipfile.ZipFile(path) as file:
        wrong = file.testzip()
        if wrong is not None:
            raise ValueError(f"{wrong} is not as it was written")


def read_state(path: Path, *, whole: bool = True) -> dict[str, Any]:
    """What is in a file of a state, without unpickling; unless it is read whole, without its tensors and unverified.

    Raises:
        ValueError: if it is damaged or not there.
    """
    if whole:
        verify(path)
    with damage(path, MEND, signs=(Exception,)):
        return dict(torch.load(path, map_location="cpu" if whole else "meta", weights_only=True, mmap=True))


def check_processes(state: Mapping[str, Any], path: Path, processes: int, blocks: int) -> None:
    """Before anything is loaded: refuse a state that another number of processes cannot go on from.

    As many blocks at once by more or fewer processes are the same steps: each then reads others of the same batch.

    Args:
        state: of a run, with or without its tensors.
        path: where it lies.
        processes: how many there are now.
        blocks: of one batch of all of them.

    Raises:
        ValueError: with both numbers.
    """
    with damage(path, MEND):
        before, then = len(state["random_state"]), int(state[BLOCKS])
    if then != blocks:
        raise ValueError(
            f"the run of {path.parent} began with {then} blocks a batch on {before} processes, and cannot go on with "
            f"{blocks} on {processes}: set data.init_args.batch_size so that they read as many at once, "
            "or start anew with --fresh"
        )


def packed(state: Any) -> Any:
    """A state with this process's rows in the place of tensors that are shared out."""
    if isinstance(state, DTensor):
        return {ROWS: len(state), "rows": state.to_local().detach().cpu()}
    if isinstance(state, Mapping):
        return {name: packed(inner) for name, inner in state.items()}
    return type(state)(map(packed, state)) if type(state) in (list, tuple) else state


def unpacked(states: Sequence[Any], whole: Callable[[Sequence[Tensor], int], Tensor]) -> Any:
    """Inverse of `packed`.

    Args:
        states: what was packed, of one process or of all; what is not shared out is that of the first.
        whole: makes a shared-out tensor of these rows, one after the other, and the number of all rows.
    """
    first = states[0]
    if isinstance(first, Mapping) and ROWS in first:
        return whole([state["rows"] for state in states], first[ROWS])
    if isinstance(first, Mapping):
        return {name: unpacked([state[name] for state in states], whole) for name in first}
    if type(first) in (list, tuple):
        return type(first)(unpacked(each, whole) for each in zip(*states, strict=True))
    return first
