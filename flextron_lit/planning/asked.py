"""What a plan is asked of: a model's shape, and the settings of its training that take memory."""

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from transformers import PreTrainedConfig

from flextron_lit.elastic.compensation import Form
from flextron_lit.space import SpaceConfig

Stage = Literal["elastic", "surrogate", "static_router", "dynamic_router", "joint_tuning"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Optimizer = Literal["adamw", "adamw_fused", "adamw_8bit"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
Precision = Literal["32-true", "bf16-mixed", "bf16-true"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of a stage that take memory, by the names that they have in its config."""

    precision: Precision = "bf16-mixed"
    """`trainer.precision`."""
    batch_size: int = 1
    """`data.init_args.batch_size`, of each process."""
    block_size: int = 512
    """`data.init_args.block_size`."""
    activation_checkpointing: bool = False
    """Of the stages that train the network."""
    loss_chunk: int | None = None
    """As `StageSettings` has it."""
    optimizer: Optimizer = "adamw"
    """`torch.optim.AdamW` as it is on a GPU (over all tensors at once), with `fused: true`, or bitsandbytes' 8-bit."""
    from_original: bool = False
    """Whether something is distilled from the frozen original."""
    compensation: Form = "own"
    """What narrower widths have of their own."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "block_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class Shape:
    """A model's shape, and the widths of its elastic blocks."""

    config: PreTrainedConfig
    space: SpaceConfig

    @property
    def alike(self) -> bool:
        """Whether all layers are: then a few say what all of them take."""
        kinds = getattr(self.config, "layer_types", None) or ["all"]
        return not self.space.layers and len({*kinds}) == 1

    def with_layers(self, layers: int) -> Self:
        """The same with fewer layers."""
        config = deepcopy(self.config)
        whole = config.num_hidden_layers
        for name, value in vars(config).items():
            if isinstance(value, list) and len(value) == whole:
                setattr(config, name, value[:layers])
        config.num_hidden_layers = layers
        return replace(self, config=config)
