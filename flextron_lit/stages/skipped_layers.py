"""Which layers a network does best without, as a whole, measured one behind the other (ours; the order of SLEB).

The loss of a layer's absence that is computed from the full network says little of several together
(docs/experiments.md); SLEB (arXiv 2402.09025) measures each candidate with those gone that it has taken before.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import inf
from typing import Any

import torch
from torch import Tensor

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.losses.measured_loss import Batch, MeasuredLoss
from flextron_lit.terminal.progress import progress

SLACK = 2.0
"""Times what the best candidate adds: one that added more when it was measured last is not measured again. What a layer
adds may fall where its neighbours are gone, so with less it would be found too late."""


@torch.no_grad()
def losses_without(
    backbone: ElasticBackbone, batches: Sequence[Batch], count: int, needed: Collection[int] = (0,)
) -> dict[int, float]:
    """The layers that go first, in order, and what each adds to the loss with those before it gone, nats per token.

    Args:
        backbone: the network; it stays as it is.
        batches: text to measure on, with `labels`.
        count: of layers to find.
        needed: layers that stay.

    Raises:
        ValueError: if fewer can go.
    """
    layers = range(len(backbone.space) // 2)
    last = {layer: -inf for layer in layers if layer not in needed}
    if count > len(last):
        raise ValueError(
            f"{count} of {len(layers)} layers cannot be skipped: attention always runs in layers "
            f"{', '.join(map(str, sorted(needed)))}; set calibration.skips to {len(last) / len(layers):.2f} or less"
        )
    measured, full = MeasuredLoss(backbone, batches), backbone.space.full()
    found: dict[int, float] = {}
    with backbone.evaluating():
        known = measured(full)
        for _ in progress(range(count), f"finding {count} layers to skip"):
            added: dict[int, float] = {}
            for layer in sorted(last, key=last.__getitem__):
                if added and last[layer] > SLACK * min(added.values()):
                    break
                with without(backbone, (*found, layer)):
                    added[layer] = measured(full) - known
            last |= added
            best = min(added, key=added.__getitem__)
            found[best] = last.pop(best)
            known += found[best]
    return found


@contextmanager
def without(backbone: ElasticBackbone, layers: Collection[int]) -> Iterator[None]:
    """Let the blocks of these layers add nothing, inside."""

    def nothing(_: Any, __: Any, output: Tensor) -> Tensor:
        return torch.zeros_like(output)

    with ExitStack() as stack:
        for elastic in backbone.blocks:
            if elastic.block.layer in layers:
                stack.callback(elastic.output.register_forward_hook(nothing).remove)
        yield
