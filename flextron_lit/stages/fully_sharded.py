"""Lightning's strategy for a network that is shared out over all processes (FSDP2), as runs here need it."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from flextron_lit.checkpoint.resume_io import RANKS, packed, read_state, unpacked
from flextron_lit.checkpoint.run_folder import beside, parts_of
from flextron_lit.files.ranks import gather

NAME = "fsdp2"


class FullySharded(ModelParallelStrategy):
    """Every process holds its rows of each weight, gradient and optimizer state; `trainer.strategy: fsdp2`.

    Lightning's own saves with torch's distributed checkpoints, in place and with a pickled index. Here each process
    writes its own rows to a file of its own, and the first one's file, written last, says which belong to it: a kill in
    between leaves the state of before. A stage is restored in the same order as by other strategies.

    Args:
        process_group_backend: of torch's process group; None means that of the device.
        timeout_minutes: how long processes wait for one that is silent; one that has ended is noticed at once.

    Raises:
        ValueError: if the time is not above 0.
    """

    def __init__(self, process_group_backend: str | None = None, timeout_minutes: float = 30.0) -> None:
        if timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes must be above 0, not {timeout_minutes}")
        super().__init__(
            "auto", 1, process_group_backend=process_group_backend, timeout=timedelta(minutes=timeout_minutes)
        )

    def setup_environment(self) -> None:
        """As Lightning does, with all processes in one dimension."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def mesh(self) -> DeviceMesh:
        """The processes."""
        return self.device_mesh["data_parallel"]

    def setup_optimizers(self, trainer: Any) -> None:
        """As Lightning does.

        Raises:
            ValueError: for an optimizer that works on whole tensors of its own form.
        """
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            if type(optimizer).__module__.startswith("bitsandbytes"):
                raise ValueError(
                    f"{type(optimizer).__name__} of bitsandbytes does not know shared-out weights; take "
                    f"torch.optim.AdamW, of whose states {NAME} leaves each process a part, or trainer.strategy ddp"
                )

    # --- the state of a run -------------------------------------------------------------------------------------

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """As other strategies: what a stage does as its fit begins follows on what it was."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Likewise."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This process's rows."""
        assert self.lightning_module is not None
        return dict(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Of this process's rows."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Inverse of `lightning_module_state_dict`."""
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Inverse of `optimizer_state`."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write this process's rows.

        Raises:
            ValueError: on every process, if one of them cannot write; the earlier state stays.
        """
        path, ranks = Path(self.broadcast(filepath)), self.world_size
        mark = self.broadcast(uuid4().hex[:8])
        state = packed(checkpoint) | {RANKS: {"number": ranks, "mark": mark}}
        # the first process's file is the one that counts, so it is written when the others are there
        for first in (False, True):
            self._together(state if (self.global_rank == 0) == first else None, beside(path, mark, self.global_rank))
        if self.is_global_zero:
            current = {beside(path, mark, rank) for rank in range(ranks)}
            for old in set(parts_of(path)) - current:
                old.unlink(missing_ok=True)

    def _together(self, state: dict[str, Any] | None, path: Path) -> None:
        failed = None
        try:
            if state is not None:
                self.checkpoint_io.save_checkpoint(state, path)
        except ValueError as error:
            failed = str(error)
        for each in gather(failed, self.world_size):
            if each is not None:
                raise ValueError(each)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The state as this process has it.

        Raises:
            ValueError: if it is another strategy's, or damaged.
        """
        path = Path(checkpoint_path)
        first = read_state(path)
        if RANKS not in first:
            raise ValueError(
                f"{path} is not the state of a run with a shared-out network: take the strategy that it had"
            )
        number, mark = first[RANKS]["number"], first[RANKS]["mark"]
        # rows of its own, or, of another number of processes, those of all: read from the disk as they are asked for
        ranks = [self.global_rank] if number == self.world_size else range(number)
        states = [read_state(beside(path, mark, rank)) for rank in ranks]
        restored: dict[str, Any] = unpacked(states, self._shared_out)
        return restored

    def _shared_out(self, rows: Sequence[Tensor], size: int) -> Tensor:
        whole, each = torch.empty((size, *rows[0].shape[1:]), device="meta"), -(-size // self.world_size)
        # a copy: what was read is a file in memory
        own = rows[0] if len(rows) == 1 else torch.cat(list(rows))[each * self.global_rank :][:each]
        return DTensor.from_local(
            own.to(self.root_device, copy=True),
            self.mesh,
            [Shard(0)],
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


StrategyRegistry.register(NAME, FullySharded, description="FSDP2: the network shared out over all processes")
