"""How the state of an unfinished run reaches the disk."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from flextron_lit.files.whole_file import whole_file
from flextron_lit.files.whole_folder import free_space


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
