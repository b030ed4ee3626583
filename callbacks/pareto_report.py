from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from flextron_lit.callbacks.tensorboard import log_figure
from flextron_lit.stages import Stage
from flextron_lit.stages.loss_history import Report


class ParetoReport(Callback):
    """Loss against cost over a run: a table at start and end, CSV and JSON in the run folder, a figure in TensorBoard.

    The first table is measured before training (Lightning's sanity check over the whole validation set), the last
    one always at the last step. A stage that watches no losses, such as the surrogate's, has no table.
    """

    def __init__(self) -> None:
        self._validated: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Go on with what an earlier part of the run wrote."""
        assert trainer.state.fn is not None
        fitting = trainer.state.fn == "fit"
        name = "training" if fitting else trainer.state.fn.value
        self._report = Report(Path(trainer.default_root_dir), name, append=fitting)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what a killed run measured after the state that this one resumes from."""
        self._report.drop_after(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """At the last step ask Lightning to stop: it then validates before it does."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a table."""
        assert isinstance(pl_module, Stage)
        self._validated = trainer.global_step
        if not trainer.is_global_zero or pl_module.result is None:
            return
        report, result = self._report, pl_module.result
        report.add(trainer.global_step, result)
        if trainer.state.fn != "fit":
            report.show()
            return
        log_figure(trainer, f"val/loss against {result.costs.name}", report.figure())
        if trainer.sanity_checking:
            for logger in trainer.loggers:
                logger.log_metrics(result.metrics("val"), step=0)
            report.show()

    on_test_end = on_validation_end

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the last step where Lightning did not: where an epoch, a clock or another callback ended the run."""
        if trainer.enable_validation and self._validated != trainer.global_step:
            # as Lightning's own loop does within an epoch
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the first table beside the last."""
        if trainer.is_global_zero and isinstance(pl_module, Stage) and pl_module.result is not None:
            self._report.show_change()

    def state_dict(self) -> dict[str, Any]:
        """The step that was validated last."""
        return {"validated": self._validated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._validated = state_dict["validated"]
