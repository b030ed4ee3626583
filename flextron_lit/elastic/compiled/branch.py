"""What is compiled: a block with the norm before it and the residual that it is added to, at one width.

Weights are inputs like any other tensor, so layers that are alike share one compilation, and so do all sub-networks.
"""

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from transformers.cache_utils import StaticLayer

from flextron_lit.elastic.families import BlockHandle, ElasticModule
from flextron_lit.elastic.families.attention import ElasticAttention

Structure = tuple[Any, ...]
NOT_COMPUTED_WITH = frozenset({"layer_idx", "training"})
"""Where an attention stands: it asks its cache by that, and here has a cache of its own. All is traced to evaluate."""
PLAIN = (bool, int, float, str, type(None))


def structure(module: nn.Module) -> Structure:
    """All of a module that a trace of it depends on: modules of equal structure share what is compiled."""
    own = ((name, each) for name, each in sorted(vars(module).items()) if type(each) in PLAIN)
    numbers = tuple((name, each) for name, each in own if name not in NOT_COMPUTED_WITH and not name.startswith("_"))
    # by name: they come from files in any order
    tensors = dict(sorted({**module._parameters, **module._buffers}.items()))
    shapes = tuple((n, t.shape, t.stride(), t.dtype, t.device) for n, t in tensors.items() if t is not None)
    children = tuple((name, structure(each)) for name, each in module.named_children())
    return type(module), numbers, shapes, children


class OneLayer:
    """The cache of one layer, for an attention that asks a whole cache by its own place."""

    def __init__(self, keys: Tensor, values: Tensor, filled: Tensor) -> None:
        self._layer = StaticLayer(keys.shape[-2])
        self._layer.keys, self._layer.values, self._layer.cumulative_length = keys, values, filled
        self._layer.device, self._layer.is_initialized = keys.device, True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As a cache's: written in place, all of it returned."""
        return self._layer.update(keys, values)


@dataclass(frozen=True)
class AtWidth(BlockHandle):
    """In place of a block's handle: one width, whatever is active."""

    units: int

    def width(self, hidden_states: Tensor) -> int:
        """That."""
        return self.units


class Branch(nn.Module):
    """`base + block(norm(hidden))`, both [B, T, D], of one list of tensors: the inputs by name, then the weights.

    Args:
        block: an elastic module.
        norm: what stands before it.
        width: in units, at which the block is taken.
        inputs: names of the first tensors: `hidden`; `base` where that is another tensor; for an attention also `mask`,
            `cos` and `sin`, and `keys`, `values`, `filled` of a static cache.
        weights: names of the others: `block.<name of a parameter>`, `norm.<...>`.
    """

    def __init__(
        self, block: ElasticModule, norm: nn.Module, width: int, inputs: tuple[str, ...], weights: tuple[str, ...]
    ) -> None:
        super().__init__()
        # in a tuple they are no sub-modules, whose weights would be a part of what is compiled
        self.parts = _twin(block), _twin(norm)
        # what is active would be traced too, and be another with every sub-network
        own = block.elastic
        vars(self.parts[0])["elastic"] = AtWidth(own.index, own.full, own.selection, width)
        self.inputs = inputs
        self.weights = weights

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """[B, T, D]; keys, values and filled are changed in place."""
        given = dict(zip(self.inputs, tensors, strict=False))
        weights = dict(zip(self.weights, tensors[len(self.inputs) :], strict=True))
        block, norm = self.parts
        hidden = functional_call(norm, _under("norm", weights), (given["hidden"],))
        said = functional_call(block, _under("block", weights), (hidden,), self._arguments(block, given))
        output = said[0] if isinstance(said, tuple) else said
        return given.get("base", given["hidden"]) + output

    def _arguments(self, block: Any, given: dict[str, Tensor]) -> dict[str, Any]:
        if not isinstance(block, ElasticAttention):
            return {}
        cache = OneLayer(given["keys"], given["values"], given["filled"]) if "keys" in given else None
        placed = {"position_embeddings": (given["cos"], given["sin"])} if "cos" in given else {}
        return {"attention_mask": given.get("mask"), block.cache: cache, **placed}


def _twin(module: nn.Module) -> nn.Module:
    """A copy that shares all tensors: tracing puts others in their place, which another thread must not see."""
    shared = [*module.parameters(), *module.buffers()]
    shared += [vars(each)[name] for each in module.modules() for name in ("config", "elastic") if name in vars(each)]
    return copy.deepcopy(module, {id(each): each for each in shared})


def _under(part: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.partition(".")[2]: each for name, each in weights.items() if name.startswith(f"{part}.")}


def named_weights(block: nn.Module, norm: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of both, by the names that `Branch` has for them."""
    both = {"block": block, "norm": norm}.items()
    return {
        f"{part}.{name}": each
        for part, module in both
        for name, each in (*module.named_parameters(), *module.named_buffers())
    }
