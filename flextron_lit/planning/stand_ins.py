"""The stages as they are in the middle of a run, on tensors that have a shape and no content."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from flextron_lit.costs import COUNTED, Workload, dynamic_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.reconstruction import prepare
from flextron_lit.elastic.sharding import shard
from flextron_lit.elastic.unit_gates import for_all_tokens
from flextron_lit.losses.by_chunk import Predictions, cross_entropy
from flextron_lit.losses.measured_loss import INPUTS
from flextron_lit.planning.asked import Shape, TrainingSettings
from flextron_lit.planning.eight_bit import EightBitStates
from flextron_lit.routers.dynamic import DynamicRouter
from flextron_lit.routers.objective import route
from flextron_lit.routers.static import StaticRouter
from flextron_lit.sources.stock import from_config
from flextron_lit.space import SubNetwork
from flextron_lit.stages import DynamicRouterTraining, ElasticTraining, JointTuning, Stage
from flextron_lit.stages.dynamic_router import KNOTS
from flextron_lit.stages.objective import Distillation
from flextron_lit.stages.precision import TRUE, of_weights
from flextron_lit.stages.tuned_router import Drawn, TunedStaticRouter

BUDGET = 0.7
TRAINER = {
    "accelerator": "cpu",
    "max_steps": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class WithoutContent(Stage):
    """Of a stage: nothing that asks what a number is."""

    def check_finite(self, values: Mapping[str, Tensor], more: str = "") -> None:
        """Nobody knows."""

    def log_step(self, metrics: dict[str, Any]) -> None:
        """There is nothing to tell."""

    def log_dict(self, *args: Any, **kwargs: Any) -> None:
        """There is nobody to tell."""


class ElasticStandIn(WithoutContent, ElasticTraining):
    """Elastic training."""


class JointStandIn(WithoutContent, JointTuning):
    """Joint tuning."""


class DynamicStandIn(WithoutContent, DynamicRouterTraining):
    """Training of a dynamic router through the backbone."""

    def _budgets(self, sequences: int) -> Tensor:
        return torch.full((sequences,), BUDGET)


class TunedStandIn(TunedStaticRouter):
    """A static router whose hard choices are not looked at."""

    def __init__(self, backbone: ElasticBackbone, hidden: int) -> None:
        self.space = backbone.space
        self.network = StaticRouter(self.space, hidden, torch.Generator())
        self.table = self.costs = COUNTED["flops"](backbone, Workload())

    def draw(
        self, budget: float, sequences: int, generator: torch.Generator, temperature: float, place: tuple[int, int]
    ) -> Drawn:
        """As a router draws, but for what its answer is."""
        routed = route(self.network, torch.tensor([budget]), generator, temperature)
        return Drawn(routed, for_all_tokens(routed.probabilities[0]), self.space.full())


@dataclass(frozen=True)
class StandIn:
    """A stage before one of its steps."""

    step: Callable[[], Any]
    backbone: ElasticBackbone
    networks: tuple[PreTrainedModel, ...]
    """The backbone's, and the frozen original."""
    others: tuple[nn.Module, ...]
    """Routers that learn."""
    optimizers: tuple[torch.optim.Optimizer, ...]
    batch: dict[str, Tensor]
    """[B, T] each."""
    trainer: Trainer
    """Stages keep no more than a weak reference to theirs."""

    @property
    def layers(self) -> Iterator[Any]:
        """Decoder layers of every network."""
        return (network.get_submodule(self.backbone.family.layers) for network in self.networks)

    def keep_states(self) -> None:
        """Have the optimizers keep what they keep from the steps before, of parameters that all had gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad()


def elastic(shape: Shape, settings: TrainingSettings, mesh: DeviceMesh | None) -> StandIn:
    """Elastic training of one sub-network beside the full one: the widest narrower one, the most that a draw takes."""
    stage = ElasticStandIn("", **_of_backbone(settings))
    trainer = _attach(stage, settings)
    optimizer = _load(stage, shape, settings, mesh)
    stage.plan = [_widest_narrower(stage.backbone)]
    return _training(stage, trainer, settings, [optimizer])


def joint_tuning(shape: Shape, settings: TrainingSettings, mesh: DeviceMesh | None) -> StandIn:
    """Joint tuning with a static router, for one budget."""
    stage = JointStandIn("", **_of_backbone(settings))
    trainer = _attach(stage, settings)
    optimizer = _load(stage, shape, settings, mesh)
    tuned: Any = TunedStandIn(stage.backbone, hidden=128)
    stage.tuned, stage.plan = [tuned], [BUDGET]
    stage.routers = nn.ModuleList([tuned.network])
    return _training(stage, trainer, settings, [optimizer, torch.optim.Adam(tuned.network.parameters())])


def dynamic_router(shape: Shape, settings: TrainingSettings, mesh: DeviceMesh | None) -> StandIn:
    """A dynamic router that learns through the frozen backbone, on the batches of its own settings."""
    stage = DynamicStandIn("")
    trainer = _attach(stage, settings)
    stage.backbone = backbone = _backbone(shape, settings)
    backbone.model.eval().requires_grad_(False)
    stage.table = dynamic_table(backbone, "flops", Workload())
    _share_out(backbone, [backbone.model], settings, mesh)
    hidden_size = int(cast(Any, backbone.model.config).hidden_size)
    stage.router = DynamicRouter(backbone.space, hidden_size, torch.linspace(0, 1, KNOTS))
    stage.plan = [BUDGET]
    own = TrainingSettings(batch_size=stage.options.batch_size, block_size=stage.options.block_size)
    return _training(stage, trainer, own, [torch.optim.Adam(stage.router.parameters())])


def measuring(shape: Shape, settings: TrainingSettings, mesh: DeviceMesh | None) -> StandIn:
    """Losses of sub-networks, forward only: the most is that of the full one. What the other stages do beside them."""
    stage = ElasticStandIn("", loss_chunk=settings.loss_chunk)
    trainer = _attach(stage, settings)
    stage.backbone = backbone = _backbone(shape, settings)
    backbone.model.eval().requires_grad_(False)
    _share_out(backbone, [backbone.model], settings, mesh)
    batch = _batch(settings)

    @torch.no_grad()
    def measure() -> None:
        with trainer.precision_plugin.forward_context(), backbone.use(backbone.space.full()):
            inputs = {name: batch[name] for name in INPUTS}
            cross_entropy(Predictions.of(backbone.model, inputs, settings.loss_chunk), batch["labels"])

    return StandIn(measure, backbone, (backbone.model,), (), (), batch, trainer)


def _of_backbone(settings: TrainingSettings) -> dict[str, Any]:
    # as configs/stages has it
    distillation = Distillation(sampled_from_full=1.0, full_from_original=float(settings.from_original))
    checkpointing, chunk = settings.activation_checkpointing, settings.loss_chunk
    return {"distillation": distillation, "activation_checkpointing": checkpointing, "loss_chunk": chunk}


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(level)


def _attach(stage: Stage, settings: TrainingSettings) -> Trainer:
    with _quiet():
        trainer = Trainer(**TRAINER, precision=settings.precision)  # type: ignore[arg-type]
    stage.trainer = trainer
    trainer.strategy.connect(stage)
    trainer.strategy.precision_plugin = of_weights(trainer.precision_plugin)
    return trainer


def _model(shape: Shape, settings: TrainingSettings) -> PreTrainedModel:
    return from_config(shape.config, dtype=TRUE.get(settings.precision, torch.float32), attn_implementation="sdpa")


def _backbone(shape: Shape, settings: TrainingSettings) -> ElasticBackbone:
    backbone = ElasticBackbone(_model(shape, settings), shape.space)
    prepare(backbone, settings.compensation)
    return backbone


def _load(
    stage: ElasticTraining | JointTuning, shape: Shape, settings: TrainingSettings, mesh: DeviceMesh | None
) -> torch.optim.Optimizer:
    stage.backbone = backbone = _backbone(shape, settings)
    if settings.activation_checkpointing:
        backbone.enable_activation_checkpointing()
    stage.model = backbone.model.train()
    if settings.from_original:
        stage._original = (_model(shape, settings).eval().requires_grad_(False),)
    _share_out(backbone, stage.networks(), settings, mesh)
    parameters = list(stage.model.parameters())
    if settings.optimizer == "adamw_8bit":
        return EightBitStates(parameters)
    # on a GPU torch updates all tensors at once, with a copy of them on the way
    fused = settings.optimizer == "adamw_fused"
    return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=fused, foreach=not fused)


def _share_out(
    backbone: ElasticBackbone, networks: Iterable[PreTrainedModel], settings: TrainingSettings, mesh: DeviceMesh | None
) -> None:
    if mesh is not None:
        for network in networks:
            shard(network, backbone.family.layers, mesh, bf16=settings.precision == "bf16-mixed")


def _batch(settings: TrainingSettings) -> dict[str, Tensor]:
    size = (settings.batch_size, settings.block_size)
    return {name: torch.zeros(size, dtype=torch.long) for name in (*INPUTS, "labels")}


def _training(
    stage: Any, trainer: Trainer, settings: TrainingSettings, optimizers: list[torch.optim.Optimizer]
) -> StandIn:
    trainer.strategy.optimizers = optimizers
    batch = _batch(settings)
    routers = [stage.routers] if isinstance(stage, JointTuning) else [stage.router] if stage.dynamic else []

    def step() -> None:
        with trainer.precision_plugin.train_step_context():
            stage.training_step(batch, 0)

    return StandIn(step, stage.backbone, (*stage.networks(),), (*routers,), (*optimizers,), batch, trainer)


def _widest_narrower(backbone: ElasticBackbone) -> SubNetwork:
    return SubNetwork(tuple(max(0, len(block.widths) - 2) for block in backbone.space.blocks))
