"""A plan: what each stage takes by each strategy on each number of GPUs, whether it fits, and what to change if not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import torch

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.positions import readable
from flextron_lit.planning import stand_ins
from flextron_lit.planning.asked import Shape, Stage, TrainingSettings
from flextron_lit.planning.gpu import Gpu
from flextron_lit.planning.kept_tables import table_bytes
from flextron_lit.planning.rehearsal import Make, Rehearsal, rehearse
from flextron_lit.sources.stock import from_config
from flextron_lit.space import ElasticSpace
from flextron_lit.stages.surrogate_training import SurrogateSettings

Strategy = Literal["one GPU", "ddp", "fsdp2"]
MAKES: dict[Stage, Make] = {
    "elastic": stand_ins.elastic,
    "surrogate": stand_ins.measuring,
    "static_router": stand_ins.measuring,
    "dynamic_router": stand_ins.dynamic_router,
    "joint_tuning": stand_ins.joint_tuning,
}
TRAINS_NETWORK: tuple[Stage, ...] = ("elastic", "joint_tuning")
MEASURED = SurrogateSettings()
"""Tokens that losses are measured on, and how many at once, as the surrogate's stage has it by default."""
ROUNDS, CHOICES = 20, 4
"""How often the surrogate's gate looks at choices of a static router's run, and at how many (its config's)."""
CHECKPOINTING, FUSED, EIGHT_BIT, TRUE, SINGLE, UNDISTILLED, CHUNKS = (
    "model.init_args.activation_checkpointing: true",
    "optimizer torch.optim.AdamW with fused: true",
    "optimizer bitsandbytes.optim.AdamW8bit (configs/optimizer/adamw8bit.yaml)",
    "trainer.precision: bf16-true",
    "data.init_args.batch_size: 1 (and model.init_args.accumulate for as many tokens an update)",
    "model.init_args.distillation.full_from_original: 0.0",
    "model.init_args.loss_chunk: null",
)
CHANGES: dict[str, dict[str, Any]] = {
    CHECKPOINTING: {"activation_checkpointing": True},
    FUSED: {"optimizer": "adamw_fused"},
    EIGHT_BIT: {"optimizer": "adamw_8bit"},
    TRUE: {"precision": "bf16-true"},
    SINGLE: {"batch_size": 1},
    UNDISTILLED: {"from_original": False},
    CHUNKS: {"loss_chunk": None},
}
AT_UPDATE = (FUSED, EIGHT_BIT, TRUE, UNDISTILLED)
BEFORE = (CHUNKS, CHECKPOINTING, SINGLE, EIGHT_BIT, TRUE, UNDISTILLED)
"""Which changes make a step smaller, whose peak is at its update or before it: what costs least first."""


@dataclass(frozen=True)
class Row:
    """One stage by one strategy on so many GPUs."""

    stage: Stage
    strategy: Strategy
    gpus: int
    parts: dict[str, float]
    """Bytes of one GPU at the peak of a step, by what they are."""
    fits: bool
    changes: tuple[str, ...] | None = ()
    """What to set so that it fits; None where no setting is enough."""
    refused: str | None = None
    """Why the stage would not start."""

    @property
    def peak(self) -> float:
        """Bytes of one GPU."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Work:
    """What a stage computes and loads, whatever the strategy."""

    stage: Stage
    tokens: int
    flops_per_token: float
    gpu_hours: float
    loading_bytes: float
    """In a process's host memory: the network is read in float32."""


@dataclass
class Planner:
    """Plans for one model.

    Args:
        shape: of the model.
        space: its widths, resolved.
        settings: of the stages.
        gpu: what they run on.
        gpus: numbers of them to plan for.
    """

    shape: Shape
    space: ElasticSpace
    settings: TrainingSettings
    gpu: Gpu
    gpus: Sequence[int]
    _rehearsed: dict[tuple[Make, TrainingSettings, bool], Rehearsal] = field(default_factory=dict)

    @classmethod
    def of(cls, shape: Shape, settings: TrainingSettings, gpu: Gpu, gpus: Sequence[int]) -> Self:
        """A planner.

        Raises:
            ValueError: if the model cannot become elastic, the widths do not fit it, or a setting has no effect.
        """
        if settings.block_size > (most := readable(shape.config)):
            raise ValueError(f"the network reads {most} tokens at once, not {settings.block_size}: lower block_size")
        with torch.device("meta"):
            model = from_config(shape.config, attn_implementation="sdpa")
        return cls(shape, ElasticBackbone(model, shape.space).space, settings, gpu, gpus)

    def rows(self, stage: Stage) -> Iterator[Row]:
        """A stage on each number of GPUs, by every strategy; of the largest number of each what to change."""
        for count in self.gpus:
            strategies: tuple[Strategy, ...] = ("one GPU",) if count == 1 else ("ddp", "fsdp2")
            for strategy in strategies:
                most = count in (1, max(self.gpus))
                yield self.row(stage, strategy, count, self.settings, advise=most)

    def row(self, stage: Stage, strategy: Strategy, gpus: int, settings: TrainingSettings, *, advise: bool) -> Row:
        """One of them.

        Args:
            stage: which.
            strategy: one process a GPU.
            gpus: how many.
            settings: of the stage.
            advise: whether to look for what to change where it does not fit.
        """
        refused = _refusal(stage, strategy, settings)
        if refused is not None:
            return Row(stage, strategy, gpus, {}, False, None, refused)
        parts = self._parts(stage, strategy, gpus, settings)
        fits = sum(parts.values()) <= self.gpu.usable_bytes
        changes = () if fits or not advise else self._changes(stage, strategy, gpus, settings, parts)
        return Row(stage, strategy, gpus, parts, fits, changes)

    def work(self, stage: Stage, tokens: int) -> Work:
        """FLOPs and hours of a stage; those that only measure losses say themselves on how many tokens."""
        measured = {
            "surrogate": (MEASURED.pairs + MEASURED.held_out + 1) * MEASURED.tokens,
            "static_router": ROUNDS * CHOICES * MEASURED.tokens,
        }
        found = self._rehearsal(stage, self.settings, 1)
        count, each = measured.get(stage, tokens), found.flops / found.tokens
        size = 2 if self.settings.precision == "bf16-true" else 4
        loading = sum(found.held[name] for name in ("network", "own_projections", "original")) * 4 / size
        return Work(stage, count, each, self.gpu.hours(count * each), loading)

    # --- bytes --------------------------------------------------------------------------------------------------

    def _parts(self, stage: Stage, strategy: Strategy, gpus: int, settings: TrainingSettings) -> dict[str, float]:
        found = self._rehearsal(stage, settings, gpus if strategy == "fsdp2" else 1)
        parts = found.parts()
        if strategy == "ddp" and stage in TRAINS_NETWORK:
            # torch's DDP exchanges gradients in buckets of its own; what narrower widths have is not among them
            parts["gradient_buckets"] = found.held["network"]
        parts["tables"] = parts.pop("others") + table_bytes(stage, self.space)
        return parts

    def _rehearsal(self, stage: Stage, settings: TrainingSettings, processes: int) -> Rehearsal:
        settings, make = of_stage(stage, settings), MAKES[stage]
        key = make, settings, processes > 1
        if key not in self._rehearsed:
            self._rehearsed[key] = rehearse(make, self.shape, settings, max(self.gpus) if processes > 1 else 1)
        return self._rehearsed[key].shared_by(processes)

    # --- what to change -----------------------------------------------------------------------------------------

    def _changes(
        self, stage: Stage, strategy: Strategy, gpus: int, settings: TrainingSettings, parts: dict[str, float]
    ) -> tuple[str, ...] | None:
        """Changes, each of what is largest at the peak that the ones before leave."""
        made: list[str] = []
        while sum(parts.values()) > self.gpu.usable_bytes:
            usual = AT_UPDATE if parts["update"] > 1 else BEFORE
            change = next((each for each in usual if self._helps(each, stage, strategy, settings)), None)
            if change is None:
                return None
            # the 8-bit optimizer takes the place of the fused one
            made = [*(each for each in made if CHANGES[each].keys() != CHANGES[change].keys()), change]
            settings = replace(settings, **CHANGES[change])
            parts = self._parts(stage, strategy, gpus, settings)
        return tuple(made)

    def _helps(self, change: str, stage: Stage, strategy: Strategy, settings: TrainingSettings) -> bool:
        changed = replace(settings, **CHANGES[change])
        if of_stage(stage, changed) == of_stage(stage, settings) or _refusal(stage, strategy, changed):
            return False
        if change == CHUNKS and strategy == "fsdp2":
            return False
        # the 8-bit optimizer updates in place too
        return not (change == FUSED and settings.optimizer == "adamw_8bit")


def of_stage(stage: Stage, settings: TrainingSettings) -> TrainingSettings:
    """The settings that a stage has: those of others are as they are by default, so that they make no difference."""
    if stage in TRAINS_NETWORK:
        return settings
    plain = TrainingSettings(precision=settings.precision, compensation=settings.compensation)
    if stage == "dynamic_router":
        return replace(plain, loss_chunk=settings.loss_chunk)
    batch_size, block_size = MEASURED.measure_batch_size, MEASURED.block_size
    if stage == "static_router" and settings.batch_size * settings.block_size > batch_size * block_size:
        # it validates on the text's own batches
        batch_size, block_size = settings.batch_size, settings.block_size
    return replace(plain, loss_chunk=settings.loss_chunk, batch_size=batch_size, block_size=block_size)


def _refusal(stage: Stage, strategy: Strategy, settings: TrainingSettings) -> str | None:
    if strategy != "fsdp2":
        return None
    if settings.loss_chunk:
        return "fsdp2 has the head whole in a pass alone, so all logits stand at once: leave loss_chunk out"
    if settings.optimizer == "adamw_8bit" and stage in TRAINS_NETWORK:
        return "bitsandbytes' optimizers do not know shared-out weights: take adamw or adamw_fused"
    return None
