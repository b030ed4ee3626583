import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flextron_lit import checkpoint as flextron_checkpoint
from flextron_lit.checkpoint import StageRecord
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.latency.latency_table import FOLDER
from flextron_lit.stages import Stage
from flextron_lit.stages.stop_on_nan import NonFiniteError, check_weights


class FlextronCheckpointWriter(Callback):
    """Writes the folder that the next stage starts from: `<run folder>/flextron`.

    Args:
        keep: `last` writes the final state; `best` the one with the lowest validation loss, the mean over domains and
            watched sub-networks, where there are routers over what they answer: if that was before the first step, the
            network goes on as the stage found it.

    Raises:
        ValueError: if `keep` is neither. At the end of a run, if there is nothing to keep: it made no update, weights
            or the last losses are not numbers, or no validation said which state was best.
    """

    def __init__(self, keep: Literal["last", "best"] = "last") -> None:
        if keep not in ("last", "best"):
            raise ValueError(f"keep is last or best, not {keep!r}")
        self.keep = keep
        self.best = float("inf")
        self.improved = False
        self.last = float("nan")
        """The last validation loss; nan before the first."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse `best` where no validation loss says which state is best."""
        assert isinstance(pl_module, Stage)
        if self.keep == "best" and not pl_module.trains_backbone:
            raise ValueError(
                f"keep best goes by the losses of watched sub-networks, which {type(pl_module).__name__} does not "
                "train; set it to last"
            )
        if self.keep == "best" and stage == "fit" and trainer.limit_val_batches == 0:
            raise ValueError(
                "keep best goes by validation losses, but trainer.limit_val_batches is 0: validate, or set keep to last"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `best`: write when the validation loss has fallen."""
        assert isinstance(pl_module, Stage)
        if trainer.state.fn != "fit" or pl_module.result is None:
            return
        self.last = loss = pl_module.result.mean_loss
        if self.keep == "last":
            return
        if trainer.sanity_checking:
            # a dense network has no folder yet to go on from
            self.best = loss if pl_module.history else self.best
        elif loss < self.best:
            self.best, self.improved = loss, True
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With `last`: write; with `best`, where nothing was better than the start: write that."""
        assert isinstance(pl_module, Stage)
        if not trainer.global_step:
            raise ValueError(
                "no checkpoint is written: the run ended before its first update; train longer, or lower "
                "model.init_args.accumulate"
            )
        if self.keep == "last":
            self._write(trainer, pl_module)
        elif not self.improved and math.isfinite(self.best):
            self._write_start(trainer, pl_module)
        elif not self.improved:
            raise NonFiniteError(
                f"no checkpoint is written: keep is best, and no validation gave a loss that is a number (the last is "
                f"{self.last}); look at the text, or start anew with --fresh and a lower learning rate"
            )

    def state_dict(self) -> dict[str, Any]:
        """The best loss so far, and the last."""
        return {"best": self.best, "improved": self.improved, "last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.best = state_dict["best"]
        # runs of before wrote whatever they had as best
        self.improved = state_dict.get("improved", self.best < float("inf"))
        self.last = state_dict.get("last", float("nan"))

    def _write_start(self, trainer: Trainer, stage: Stage) -> None:
        """The checkpoint that the stage started from, with a record of what was tried."""
        if trainer.is_global_zero:
            source, folder = stage.source_folder, RunFolder(Path(trainer.default_root_dir)).checkpoint
            record = replace(stage.record(), steps=0)
            flextron_checkpoint.extend(source, folder, files={}, history=[*stage.history, record])
            rank_zero_info(
                f"no validation was better than {self.best:.3f}, the mean before training: {folder} is the network of "
                f"{source} as it was"
            )
        trainer.strategy.barrier()

    def _write(self, trainer: Trainer, stage: LightningModule) -> None:
        assert isinstance(stage, Stage)
        check_weights(stage.held_weights(), trainer.global_step, trainer.world_size)
        if math.isinf(self.last):
            raise NonFiniteError(
                f"no checkpoint is written: the loss of the last validation, at step {trainer.global_step}, is no "
                "number (see the tables); start anew with --fresh and a lower learning rate"
            )
        record = stage.record()
        whole = stage.gathered_weights() if stage.trains_backbone else {}
        if trainer.is_global_zero:
            run_folder = RunFolder(Path(trainer.default_root_dir))
            folder = run_folder.checkpoint
            history: list[Mapping[str, Any] | StageRecord] = [*stage.history, record]
            files: dict[str, Path | bytes] = {**cost_files(stage, run_folder.path), **stage.files()}
            if stage.trains_backbone:
                backbone, tokenizer = stage.backbone, stage.tokenizer
                kept: Any = {"order": stage.order, "history": history, "files": files, "state_dict": whole}
                flextron_checkpoint.write(folder, backbone, tokenizer, **kept)
            else:
                source = stage.source_folder
                flextron_checkpoint.extend(source, folder, history=history, files=files, without=stage.drops)
            rank_zero_info(f"wrote the Flextron checkpoint {folder}")
        trainer.strategy.barrier()


def cost_files(stage: Stage, run_folder: Path) -> dict[str, Path]:
    """Cost tables that hold for a stage's network: those that its run measured, and those of its checkpoint.

    A table depends on the widths alone, not on the weights, so training leaves it true.
    """
    source = stage.source_folder
    folders = [run_folder]
    if flextron_checkpoint.is_flextron(source) and flextron_checkpoint.read(source).space == stage.backbone.space:
        folders.insert(0, source)
    return {f"{FOLDER}/{path.name}": path for folder in folders for path in (folder / FOLDER).glob("*.json")}
