"""What users put on a projection: LoRA adapters of peft are sliced with it, all else is refused at narrower widths.

A narrower width never calls the projections' modules, it takes views of their weights; so what wraps, replaces or hooks
a module would be passed by without a word (ours). peft is not imported here: where it is in use, it is there.
"""

import sys
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D
"""Both kinds of linear layer: GPT-2's holds its weight transposed, and always has a bias."""
PLAIN = (nn.Linear, Conv1D)
"""Asked for first: a look for an attribute that a module lacks takes longer than a small product."""
WAYS_OUT = "merge or remove it, or use the full network alone"


@dataclass(frozen=True)
class Adapter:
    """What one LoRA adapter adds to a projection: a product with `up`, of what `down` makes of the input."""

    down: Tensor
    """[r, in]."""
    up: Tensor
    """[out, r]."""
    scaling: float
    dropout: nn.Module

    def inner(self, inputs: Tensor) -> Tensor:
        """[..., first features of the input] to [..., r]."""
        inputs = self.dropout(inputs.to(self.down.dtype))
        return F.linear(inputs, self.down[:, : inputs.shape[-1]]) * self.scaling

    def delta(self) -> Tensor:
        """What it adds to the weight once it is merged, [out, in]."""
        return self.up @ self.down * self.scaling


def plain(layer: nn.Module) -> Linear:
    """The linear layer itself, below what wraps it."""
    if type(layer) in PLAIN:
        return cast(Linear, layer)
    return cast(Linear, getattr(layer, "base_layer", layer))


def is_lora(layer: nn.Module) -> TypeGuard[Any]:
    """Whether it is a linear layer that peft has put LoRA adapters on."""
    peft = sys.modules.get("peft.tuners.lora.layer")
    return peft is not None and type(layer) is peft.Linear


def active(layer: nn.Module) -> tuple[Adapter, ...]:
    """The adapters that a layer's output is the sum of, beside its own weight; those merged into it are not."""
    if type(layer) in PLAIN or not is_lora(layer):
        return ()
    if layer.disable_adapters:
        if layer.merged:
            # as peft does, once the layer is asked for something
            layer.unmerge()
        return ()
    return () if layer.merged else _named(layer, layer.active_adapters)


def merged(layer: nn.Module) -> tuple[Adapter, ...]:
    """The adapters that are part of a layer's own weight for now."""
    return _named(layer, layer.merged_adapters) if is_lora(layer) else ()


def bias_of(layer: Any) -> Tensor | None:
    """The bias [out] with those of its active adapters, if any."""
    bias: Tensor | None = layer.bias
    if type(layer) in PLAIN:
        return bias
    if is_lora(layer) and not (layer.merged or layer.disable_adapters):
        for name in layer.active_adapters:
            own = layer.lora_B[name].bias if name in layer.lora_B else None
            if own is not None:
                bias = own * layer.scaling[name] + (0 if bias is None else bias)
    return bias


def add(outputs: Tensor, inputs: Tensor, adapters: tuple[Adapter, ...], rows: slice = slice(None)) -> Tensor:
    """What a layer gives [..., rows] of its inputs [..., in], and what adapters add to those rows of its output."""
    for adapter in adapters:
        outputs = (outputs + F.linear(adapter.inner(inputs), adapter.up[rows])).to(outputs.dtype)
    return outputs


@torch.no_grad()
def delta_of(layer: nn.Module, *, those_merged: bool = False) -> Tensor | None:
    """What adapters would add to the layer's weight [out, in] if they were merged; None if there are none.

    Args:
        layer: a projection.
        those_merged: also those that are merged already: a weight beside the layer's own does not have them.
    """
    found = active(layer) or (merged(layer) if those_merged else ())
    return torch.stack([adapter.delta() for adapter in found]).sum(0) if found else None


def refuse_foreign(layer: nn.Module, linear: type[nn.Module], name: str) -> None:
    """Refuse what narrower widths would pass by.

    Args:
        layer: a projection as it stands in its block.
        linear: the class that it must have, or the layer below its adapters.
        name: of the projection, for the message.

    Raises:
        ValueError: if it is of another class, is hooked, or carries adapters other than plain LoRA.
    """
    below = layer.base_layer if is_lora(layer) else layer
    if type(below) is not linear:
        raise ValueError(
            f"{name} is a {type(below).__name__}, but narrower widths take views of a {linear.__name__}; {WAYS_OUT}"
        )
    for each in (layer, below):
        if hooked(each):
            raise ValueError(f"{name} carries hooks or a forward of its own, which narrower widths pass by; {WAYS_OUT}")
    if is_lora(layer):
        if layer.bias is None and any(each.bias is not None for each in layer.lora_B.values()):
            raise ValueError(f"{name} has no bias, but an adapter adds one, which no merged network could hold")
        special = [each for each in (*layer.active_adapters, *layer.merged_adapters) if each in layer.lora_variant]
        if special:
            kind = type(layer.lora_variant[special[0]]).__name__
            raise ValueError(
                f"the adapter {special[0]!r} of {name} is a {kind}, but narrower widths can slice plain LoRA alone; "
                f"{WAYS_OUT}"
            )


def untouched(layer: nn.Module, linear: type[nn.Module]) -> bool:
    """Whether a projection is as it was made: checked at every pass, so nothing else is looked at."""
    return type(layer) is linear and not hooked(layer)


def hooked(layer: nn.Module) -> bool:
    """Whether anything runs with a module that is not its class's own."""
    state = layer.__dict__
    forward = state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state
    return bool(forward or state["_backward_hooks"] or state["_backward_pre_hooks"])


def _named(layer: Any, names: list[str]) -> tuple[Adapter, ...]:
    return tuple(
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], layer.lora_dropout[name])
        for name in names
        if name in layer.lora_A
    )
