"""How much the loss minds an error in a block's output: covariances of gradients, from one backward pass (ours)."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock
from flextron_lit.elastic.importance import Batch, inputs_of


def output_gradients(backbone: ElasticBackbone, batches: Iterable[Batch], generator: torch.Generator) -> list[Tensor]:
    """Mean over tokens of g g^T, with g the gradient at a block's output of the summed loss of the full network.

    The labels are drawn from the model itself, so that this is its Fisher information and not that of the text: an
    error of the outputs with covariance E then costs `tr(F E) / 2` nats per token, to second order.

    Args:
        backbone: the elastic network, on the device to run on.
        batches: each with `input_ids` [B, T] and, for packed documents, `position_ids` [B, T].
        generator: source of the labels, on the processor.

    Returns:
        One tensor [D, D] a block, float32 on the processor: of a 7B model 4 GB.
    """
    totals = [torch.zeros(2 * (elastic.outgoing.shape[1],)) for elastic in backbone.blocks]
    tokens = 0
    with backbone.use(backbone.space.full()), backbone.evaluating():
        for batch in batches:
            for total, gradient in zip(totals, _gradients(backbone, batch, generator), strict=True):
                total += (gradient.T @ gradient).cpu()
            tokens += batch["input_ids"].numel()
    return [total / tokens for total in totals]


@torch.enable_grad()
def _gradients(backbone: ElasticBackbone, batch: Batch, generator: torch.Generator) -> Sequence[Tensor]:
    """At the output of every block, [tokens, D] each."""
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for index, elastic in enumerate(backbone.blocks):
            stack.callback(_keep(elastic, index, outputs).remove)
        logits = backbone.model(**inputs_of(backbone, batch), use_cache=False).logits.flatten(0, 1).float()
    drawn = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    with torch.no_grad():
        labels = (logits.softmax(-1).cumsum(-1) < drawn).sum(-1).clamp(max=logits.shape[-1] - 1)
    loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, [outputs[index] for index in range(len(backbone.blocks))])
    return [gradient.flatten(0, -2).float() for gradient in gradients]


def _keep(elastic: ElasticBlock, index: int, outputs: dict[int, Tensor]) -> torch.utils.hooks.RemovableHandle:
    def keep(_: nn.Module, inputs: Any, output: Tensor) -> None:
        # of a frozen network nothing would lead back to it
        outputs[index] = output if output.requires_grad else output.requires_grad_()

    return elastic.output.register_forward_hook(keep)
