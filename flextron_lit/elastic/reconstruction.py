"""The first thing that happens to a network: units in order, projections for narrower widths, in closed form (ours).

One pass of the full network over the calibration text. Each block is ordered and reconstructed when its turn in the
pass comes, from what its output projection reads just then, so that the moments of one block at a time are in memory.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock
from flextron_lit.elastic.compensation import ATTRIBUTE, Compensation, Form, anchors, shapes
from flextron_lit.elastic.importance import Batch, inputs_of, permute
from flextron_lit.elastic.least_squares import excess_loss, greedy_order, own_projection, rows_of, unit_scales
from flextron_lit.elastic.prefix import weight_of
from flextron_lit.terminal.progress import progress


@dataclass(frozen=True)
class Reconstructed:
    """What the pass finds of one block."""

    order: Tensor
    """The unit that shall stand at each position, [units]."""
    compensation: dict[str, Tensor]
    """By the names of `Compensation`."""
    excess: list[float] | None
    """Nats per token that each width loses, the full one 0; None without Fisher information."""
    absent: float | None = None
    """The same of the block's absence, whether or not the space has width 0."""


@torch.no_grad()
def reconstruct(
    backbone: ElasticBackbone,
    batch: Batch,
    orders: Sequence[Tensor] | None,
    form: Form,
    fisher: Sequence[Tensor] | None = None,
) -> list[Reconstructed]:
    """Order the units of every block, and work out what makes up for those that each width leaves out.

    Args:
        backbone: the elastic network, on the device to run on; it stays as it is, see `rebuild`.
        batch: the whole calibration text: `input_ids` [B, T] and, for packed documents, `position_ids` [B, T].
        orders: one [units] a block; None means greedy, see `greedy_order`.
        form: what makes up: `own` projections, `scales`, or `none`.
        fisher: one [D, D] a block, see `output_gradients`; for the excess losses.

    Returns:
        One entry a block, in the order of the space, on the processor.
    """
    found: dict[int, Reconstructed] = {}
    # blocks come to us, so the bar is asked to go on by each of them
    steps = progress(backbone.blocks, f"reconstructing {len(backbone.blocks)} blocks")
    with backbone.use(backbone.space.full()), backbone.evaluating(), ExitStack() as stack:
        for index, elastic in enumerate(backbone.blocks):

            def read(_: nn.Module, given: tuple[Any, ...], index: int = index, elastic: ElasticBlock = elastic) -> None:
                order, own = (None if each is None else each[index] for each in (orders, fisher))
                found[index] = _block(elastic, given[0], order, form, own)
                next(steps)

            stack.callback(elastic.output.register_forward_pre_hook(read).remove)
        backbone.model(**inputs_of(backbone, batch), use_cache=False, logits_to_keep=1)
    next(steps, None)
    return [found[index] for index in range(len(backbone.blocks))]


def rebuild(backbone: ElasticBackbone, found: Sequence[Reconstructed]) -> None:
    """Put the units in the order that was found, in place, and attach what makes up for narrower widths."""
    permute(backbone, [each.order for each in found])
    compensate(backbone, [each.compensation for each in found])


def compensate(backbone: ElasticBackbone, tensors: Sequence[dict[str, Tensor]]) -> None:
    """Attach what makes up for narrower widths to every block, in the place of what was there.

    Args:
        backbone: the elastic network.
        tensors: of each block, by the names of `Compensation`; moved to the dtype and device of its projection.

    Raises:
        ValueError: if a tensor does not have the shape that its block's width asks for; nothing is then changed.
    """
    for elastic, own in zip(backbone.blocks, tensors, strict=True):
        _check_shapes(elastic, own)
    for elastic, own in zip(backbone.blocks, tensors, strict=True):
        like = elastic.outgoing
        made = Compensation({name: tensor.detach().to(like) for name, tensor in own.items()})
        setattr(elastic.module, ATTRIBUTE, made.requires_grad_(like.requires_grad))
    # a saved model is a plain one: its loaders would not know what to do with these
    ignored = set(backbone.model._keys_to_ignore_on_save or ())
    backbone.model._keys_to_ignore_on_save = ignored | set(backbone.compensations)


def prepare(backbone: ElasticBackbone, form: Form) -> None:
    """Attach zeros of the right shapes, for a state that is loaded afterwards."""

    def zeros(elastic: ElasticBlock) -> dict[str, Tensor]:
        named = shapes(elastic.block.widths, elastic.rows, elastic.outgoing.shape[1], form)
        return {name: torch.zeros(shape) for name, shape in named.items()}

    compensate(backbone, [zeros(elastic) for elastic in backbone.blocks])


def _check_shapes(elastic: ElasticBlock, tensors: dict[str, Tensor]) -> None:
    hidden_size, widths = elastic.outgoing.shape[1], elastic.block.widths
    for name, tensor in tensors.items():
        kind, _, width = name.partition(".")
        wanted = [hidden_size, int(width) * elastic.rows] if kind == "projections" else [int(width)]
        if list(tensor.shape) != wanted or int(width) not in widths[:-1]:
            raise ValueError(
                f"{name} of {elastic.block.name} is {list(tensor.shape)}, but {wanted} is needed, for a width below "
                f"the full one of {list(widths)}: it was made for another model"
            )


def _block(
    elastic: ElasticBlock, activations: Tensor, order: Tensor | None, form: Form, fisher: Tensor | None
) -> Reconstructed:
    block, rows, projection = elastic.block, elastic.rows, weight_of(cast(Any, elastic.output)).double()
    read = activations.flatten(0, -2).float()
    # float64: solving squares what rounding there is
    gram = (read.T @ read).double() / len(read)
    if order is None:
        order = greedy_order(gram, projection, block.full, picks=max((0, *block.widths[:-1])))
    where = rows_of(order.to(gram.device), rows)
    gram, projection = gram[where][:, where], projection[:, where]
    tensors = dict(_compensation(gram, projection, block.widths, rows, form))
    made = Compensation(tensors)
    excess = absent = None
    if fisher is not None:
        lost = partial(excess_loss, gram, projection, fisher=fisher.to(gram))
        absent = lost(projection[:, :0])
        excess = [*(lost(made.folded(projection, w, w * rows)) if w else absent for w in block.widths[:-1]), 0.0]
    return Reconstructed(order.cpu(), {name: t.float().cpu() for name, t in tensors.items()}, excess, absent)


def _compensation(
    gram: Tensor, projection: Tensor, widths: tuple[int, ...], rows: int, form: Form
) -> Iterator[tuple[str, Tensor]]:
    if form == "none":
        return
    own = {w: own_projection(gram, projection, w * rows) for w in anchors(widths, form)}
    for width in widths[:-1]:
        if width in own:
            yield f"projections.{width}", own[width]
        elif width:
            base = own[min(w for w in own if w > width)] if own else projection
            yield f"scales.{width}", unit_scales(gram, projection, base, width, rows)
