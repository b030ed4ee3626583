"""The shape of a family file: what differs between Hugging Face model families, and nothing else knows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.adapters import active, add, bias_of, merged, plain, refuse_foreign, untouched
from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.compensation import Compensation
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.prefix import weight_of
from flextron_lit.elastic.selection import ActiveSelection
from flextron_lit.space import BlockKind


@dataclass(frozen=True)
class BlockHandle:
    """All that an elastic module holds: which block it is, and whom to ask."""

    index: int
    full: int
    selection: ActiveSelection

    def width(self, hidden_states: Tensor) -> int | TokenGroups:
        """Units that this block uses for this input, [B, T, D]: one number, or a width for every token.

        Tokens that all choose alike have one number, but in attention narrower than full: there it would mean that
        keys and values are narrow too.
        """
        width = self.selection.width(self.index, hidden_states)
        if isinstance(width, TokenGroups) and width.order is None:
            mlp = self.selection.space.blocks[self.index].kind == "mlp"
            return width.units if mlp or width.units == self.full else width
        return width


class ElasticModule(nn.Module):
    """Stands in for a stock attention or MLP, and uses its first units only; the class is the table of its layers.

    A family's class has an elastic base first and the stock class last among its bases. It adds no state but the
    handle and what narrower widths have of their own, so that a module becomes elastic, and stock again, by a change of
    its class alone.
    """

    elastic: BlockHandle
    compensation: Compensation
    path: ClassVar[str]
    """Attribute path of the module within a decoder layer."""
    norm: ClassVar[str]
    """Attribute path of the norm before it, likewise."""
    inner: ClassVar[tuple[str, ...]]
    """Layers that compute the units."""
    outer: ClassVar[str]
    """Layer that reads them, [B, T, units x rows of a unit]."""
    linear: ClassVar[type[nn.Linear | Conv1D]] = nn.Linear
    """Class of those layers, exactly."""
    parts: ClassVar[int] = 1
    """Equal segments of what an inner layer computes; see `Axis`."""
    shared: ClassVar[frozenset[str]] = frozenset()
    """Parameters that all widths use whole, beside the bias of the outer layer."""

    @staticmethod
    def full_width(config: PreTrainedConfig) -> int:
        """Number of units, from the model's config."""
        raise NotImplementedError

    @classmethod
    def stock(cls) -> type[nn.Module]:
        """The Hugging Face class whose modules it can stand in for."""
        return cls.__bases__[-1]

    @classmethod
    def axes(cls) -> tuple[Axis, ...]:
        """Every tensor that carries units, with biases that the model may lack."""
        # GPT-2's linear layer holds its weight the other way round
        outputs, inputs = (1, 0) if cls.linear is Conv1D else (0, 1)
        weights = [Axis(f"{name}.weight", outputs, cls.parts) for name in cls.inner]
        biases = [Axis(f"{name}.bias", 0, cls.parts) for name in cls.inner]
        return (*weights, *biases, Axis(f"{cls.outer}.weight", inputs))

    def read(self, units: Tensor, width: int) -> Tensor:
        """By the outer layer, what a width's own units say: [..., width x rows of a unit] to [..., D]."""
        outer: Any = getattr(self, self.outer)
        weight, units = self.compensation.reading(weight_of(outer), units, width)
        outputs = F.linear(units, weight, bias_of(outer))
        if type(outer) is self.linear:
            return outputs
        adapters = active(outer) or (merged(outer) if self.compensation.owns(width) else ())
        return add(outputs, units, adapters)

    def refuse_foreign(self) -> None:
        """Refuse what narrower widths would pass by.

        Raises:
            ValueError: if a projection is not as it was made and carries no plain LoRA adapter either.
        """
        for name in (*self.inner, self.outer):
            layer = cast(nn.Module, self._modules[name])
            if not untouched(layer, self.linear):
                block = self.elastic.selection.space.blocks[self.elastic.index]
                refuse_foreign(layer, self.linear, f"{name} of {block.name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == self.outer and name in self._modules:
            self._take_over(self._modules[name], value)
        super().__setattr__(name, value)

    @torch.no_grad()
    def _take_over(self, wrapped: nn.Module | None, layer: Any) -> None:
        """Adapters that stay in the layer's weight when their wrapper goes belong to narrower widths' own weights too.

        Raises:
            ValueError: if they are no plain LoRA.
        """
        if wrapped is None or not merged(wrapped) or layer is not plain(wrapped):
            return
        self.refuse_foreign()
        for projection in self.compensation.projections.values():
            for adapter in merged(wrapped):
                projection += adapter.delta()[:, : projection.shape[1]]

    def narrow(self, width: int) -> None:
        """Note that the weights hold so many units, in families whose stock forward reads such a number."""


def uniform_config(config: PreTrainedConfig, groups: int, neurons: int) -> dict[str, Any]:
    """Config fields of a model with so many KV groups and neurons in every layer; heads keep their size."""
    return {
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "num_attention_heads": config.num_attention_heads // config.num_key_value_heads * groups,
        "num_key_value_heads": groups,
        "intermediate_size": neurons,
    }


def neurons_alone(
    config: PreTrainedConfig, heads: int, neurons: int, name: str = "intermediate_size"
) -> dict[str, Any] | None:
    """The same for classes that derive the size of a head from their number, which therefore stays.

    Args:
        config: of the full network.
        heads: in every layer.
        neurons: in every layer.
        name: what the config calls them.
    """
    return {name: neurons} if heads == config.num_attention_heads else None


def one_after_the_other(config: PreTrainedConfig) -> bool:
    """Not parallel, whatever the config says."""
    return False


@dataclass(frozen=True)
class Family:
    """A Hugging Face model family; defaults are what Llama and those after it have."""

    model: type[PreTrainedModel]
    """The causal LM class."""
    blocks: dict[BlockKind, type[ElasticModule]]
    """What its attention and its MLP become."""
    layers: str = "model.layers"
    """Attribute path of the decoder layers."""
    parallel: Callable[[PreTrainedConfig], bool] = one_after_the_other
    """Whether MLP and attention of a layer read the same, rather than the MLP what the attention has added to."""
    uniform_config: Callable[[PreTrainedConfig, int, int], dict[str, Any] | None] = uniform_config
    """Config fields of a stock model with so many KV groups and neurons in every layer; None if none can hold it."""
