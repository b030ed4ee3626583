from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from flextron_lit.callbacks.tensorboard import log_figure
from flextron_lit.checkpoint.in_memory import blank_elastic
from flextron_lit.costs import Workload
from flextron_lit.latency.block_times import profile
from flextron_lit.latency.latency_table import LatencyTable, conditions, find
from flextron_lit.latency.recheck import recheck
from flextron_lit.latency.routed_times import profile_dynamic
from flextron_lit.routers.plots import predicted_against_observed
from flextron_lit.stages import Stage


class LatencyProfiling(Callback):
    """Gives a stage the latency table of the device it runs on: `stage.cost_table("latency")` then works.

    A table that was measured under the same conditions is taken from the run folder, or from the stage's checkpoint if
    a few fresh networks take what it says; else the first rank measures one, on a network of the same shape, and shares
    it. It goes into the run's checkpoint; routers for one that holds no more keep theirs. A dynamic stage gets the
    table of a dynamic router.

    Args:
        workload: the request whose latencies count.
        seconds: for measuring; the check on held-out sub-networks takes about as long again.
        held_out: sub-networks, or mixtures of choices, to check the table on, and to correct it by if there are 4.
        recheck: seconds for checking a table of the stage's checkpoint on fresh networks; a few rounds run however long
            they take. 0 takes it as it is.
        compiled: measure compiled widths (`--compile`), which routers for such a table then answer for.

    Raises:
        ValueError: if a number is out of range, or a dynamic router's latencies are to be compiled ones.
    """

    def __init__(
        self,
        workload: Workload = Workload(),
        seconds: float = 60.0,
        held_out: int = 20,
        recheck: float = 10.0,
        compiled: bool = False,
    ) -> None:
        if seconds <= 0 or held_out < 0 or recheck < 0:
            raise ValueError(
                f"seconds must be above 0 and held_out 0 or more, recheck too, not {seconds}, {held_out} and {recheck}"
            )
        self.workload = workload
        self.seconds = seconds
        self.held_out = held_out
        self.recheck = recheck
        self.compiled = compiled

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find or measure the table."""
        assert isinstance(pl_module, Stage)
        found: Any = self._table(trainer, pl_module).to_json() if trainer.is_global_zero else None
        pl_module.latency = LatencyTable.from_json(trainer.strategy.broadcast(found))
        for name, phase in pl_module.latency.phases.items():
            if phase.held_out:
                predicted, measured = zip(*((row.predicted, row.measured) for row in phase.held_out), strict=True)
                title = f"{name}, {len(measured)} held out: mean error {phase.error:.1%}"
                what = "time (share of the full network's)"
                figure = predicted_against_observed(predicted, measured, title, what)
                log_figure(trainer, f"latency/{name}, predicted against observed", figure)

    def _table(self, trainer: Trainer, stage: Stage) -> LatencyTable:
        backbone = stage.backbone
        if self.compiled and stage.dynamic:
            raise ValueError("compiled has no effect on a dynamic router: its tokens run through the network as it is")
        wanted = conditions(backbone, self.workload, "dynamic" if stage.dynamic else "static", compiled=self.compiled)
        run_folder = Path(trainer.default_root_dir)
        # what this run began with, it goes on with
        own = find(run_folder, wanted)
        if own is not None:
            rank_zero_info(f"latencies: {own[0]}")
            return own[1]
        earlier = find(stage.source_folder, wanted)
        # a run of an earlier release took it over and left no copy: it goes on with it too
        if earlier is not None and (not self.recheck or trainer.ckpt_path is not None):
            rank_zero_info(f"latencies: {earlier[0]}")
            return earlier[1]
        dtype: torch.dtype = getattr(torch, self.workload.dtype)
        # shapes alone: weights do not change times, and may be spread over processes
        compensation = [
            {name: torch.zeros(own.shape) for name, own in elastic.compensation.named_parameters()}
            for elastic in backbone.blocks
        ]
        blank = blank_elastic(backbone.model.config, backbone.space, compensation, dtype=dtype, device=stage.device)
        blank.compile_widths(self.compiled)
        if earlier is not None:
            again = recheck(blank, earlier[1], budget_seconds=self.recheck)
            rank_zero_info(f"latencies: {earlier[0]} {again.told()}")
            if again.holds:
                again.table.write(run_folder)
                return again.table
        measure = profile_dynamic if stage.dynamic else profile
        table = measure(blank, self.workload, budget_seconds=self.seconds, held_out=self.held_out)
        rank_zero_info(f"latencies: measured, wrote {table.write(run_folder)}")
        return table
