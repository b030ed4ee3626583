"""Differentiable widths: the full network with a gate on every unit, for gradients of choices through the backbone.

With one-hot choices the value is that of the sub-network; unlike it, the pass computes every unit, since the gradient
of a choice that was not taken needs what it would have added. For training routers only, never to save time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock
from flextron_lit.elastic.families import ElasticModule
from flextron_lit.space import Block

Choose = Callable[[int, Tensor], Tensor]
"""(block, its own input [B, T, D]) to the probabilities of its choices: [N] for all tokens, or [B, T, N] for each."""


def unit_gates(probabilities: Tensor, block: Block) -> Tensor:
    """Probability that each unit is in use: the sum over the choices that are wide enough (nested gates).

    Args:
        probabilities: of the block's choices, [..., N]; more columns than it has choices do not count.
        block: whose units.

    Returns:
        [..., units], gradients flow into `probabilities`.
    """
    wide_enough = probabilities[..., : len(block.widths)].flip(-1).cumsum(-1).flip(-1)
    edges = [0, *block.widths]
    return torch.cat(
        [
            wide_enough[..., c : c + 1].expand(*wide_enough.shape[:-1], stop - start)
            for c, (start, stop) in enumerate(pairwise(edges))
        ],
        -1,
    )


def for_all_tokens(probabilities: Tensor) -> Choose:
    """The same probabilities for every token, [2L, N]: what a static router chooses."""
    return lambda block, _: probabilities[block]


@contextmanager
def gated(backbone: ElasticBackbone, choose: Choose) -> Iterator[None]:
    """Run the full network with every unit's activation times its gate.

    Keys and values are those of the full width for every token, as grouped execution has them.
    """
    with backbone.use(backbone.space.full()), ExitStack() as stack:
        for index, elastic in enumerate(backbone.blocks):
            hooks = _gate if elastic.compensation.empty else _mix
            for hook in hooks(elastic, index, choose):
                stack.callback(hook.remove)
        yield


def _gate(elastic: ElasticBlock, index: int, choose: Choose) -> list[RemovableHandle]:
    """Hooks for a block whose widths all read with the first columns of one projection."""
    gates: Tensor | None = None

    def on_input(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal gates
        gates = unit_gates(choose(index, _hidden_states(inputs, options)), elastic.block)

    def on_units(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert gates is not None
        activations, *rest = inputs
        return (activations * gates.repeat_interleave(elastic.rows, -1).to(activations.dtype), *rest)

    def on_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert gates is not None
        # a skipped block adds nothing, not even the bias that all widths share
        return output * gates[..., :1].to(output.dtype)

    hooks = [elastic.module.register_forward_pre_hook(on_input, with_kwargs=True)]
    hooks.append(elastic.output.register_forward_pre_hook(on_units))
    if elastic.block.widths[0] == 0:
        hooks.append(elastic.output.register_forward_hook(on_output))
    return hooks


def _mix(elastic: ElasticBlock, index: int, choose: Choose) -> list[RemovableHandle]:
    """Hooks for a block whose widths read in ways of their own: the mean of what each of them gives."""
    chosen: Tensor | None = None

    def on_input(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal chosen
        chosen = choose(index, _hidden_states(inputs, options))

    def on_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert chosen is not None
        (*narrower, _), reader = elastic.block.widths, cast(ElasticModule, elastic.module)
        shares, last = chosen.to(output.dtype), len(narrower)
        read = (
            shares[..., c : c + 1] * reader.read(inputs[0][..., : width * elastic.rows], width)
            for c, width in enumerate(narrower)
            if width
        )
        return sum(read, shares[..., last : last + 1] * output)

    hooks = [elastic.module.register_forward_pre_hook(on_input, with_kwargs=True)]
    return [*hooks, elastic.output.register_forward_hook(on_output)]


def _hidden_states(inputs: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    return inputs[0] if inputs else options["hidden_states"]
