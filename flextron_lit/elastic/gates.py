"""Differentiable widths: the full network with a gate on every unit, for gradients of choices through the backbone.

With one-hot choices the value is that of the sub-network; unlike it, the pass computes every unit, since the gradient
of a choice that was not taken needs what it would have added. For training routers only, never to save time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock
from flextron_lit.space import Block


def unit_gates(probabilities: Tensor, block: Block) -> Tensor:
    """Probability that each unit is in use: the sum over the choices that are wide enough (nested gates).

    Args:
        probabilities: of the block's choices, [N]; more columns than it has choices do not count.
        block: whose units.

    Returns:
        [units], gradients flow into `probabilities`.
    """
    widths = torch.tensor(block.widths, device=probabilities.device)
    uses = torch.arange(block.full, device=probabilities.device)[:, None] < widths  # [units, choices]
    return (uses.to(probabilities.dtype) * probabilities[: len(widths)]).sum(-1)


@contextmanager
def gated(backbone: ElasticBackbone, probabilities: Tensor) -> Iterator[None]:
    """Run the full network with every unit's activation times its gate.

    Args:
        backbone: the elastic network.
        probabilities: of all choices, [2L, N].
    """
    with ExitStack() as stack:
        stack.enter_context(backbone.use(backbone.space.full()))
        for elastic, own in zip(backbone.blocks, probabilities, strict=True):
            stack.enter_context(_gate(elastic, own))
        yield


@contextmanager
def _gate(elastic: ElasticBlock, probabilities: Tensor) -> Iterator[None]:
    gates = unit_gates(probabilities, elastic.block)
    runs = gates[0]  # the first unit is in use at every width but 0

    def on_units(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        activations, *rest = inputs
        rows = activations.shape[-1] // elastic.block.full
        return (activations * gates.repeat_interleave(rows).to(activations.dtype), *rest)

    def on_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # a skipped block adds nothing, not even the bias that all widths share
        return output * runs.to(output.dtype)

    hooks = [elastic.output.register_forward_pre_hook(on_units)]
    if elastic.block.widths[0] == 0:
        hooks.append(elastic.output.register_forward_hook(on_output))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
