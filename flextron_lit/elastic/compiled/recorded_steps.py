"""Decode steps recorded as CUDA graphs: one launch for all layers of a sub-network, each of which makes dozens (ours).

A graph reads and writes fixed addresses, so there is one for each sub-network and KV cache in use. Recording takes as
long as two steps.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Run = Callable[[], Tensor]
MOST = 64
"""Recordings that are kept; the one that was used longest ago goes first."""


def record(run: Run, rewind: Callable[[], None]) -> tuple[Callable[[], Any], Tensor]:
    """Record what a run does on the GPU.

    Args:
        run: reads and writes the same tensors each time.
        rewind: undoes what a run has done to them.

    Returns:
        What does it again, and the tensor that then holds the result.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # once outside of the recording, which allows for no first times
        run()
    torch.cuda.current_stream().wait_stream(stream)
    rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph.replay, output


class RecordedStep:
    """All layers of one sub-network for one more token, with one KV cache.

    Args:
        run: the layers, of the inputs by name.
        inputs: as they are now: tensors whose values change from step to step, but not their shapes.
        rewind: takes the token of a run back from the cache.
        cache: the KV cache, kept as long as what writes to it.
    """

    def __init__(
        self, run: Callable[[Tensors], Tensor], inputs: Tensors, rewind: Callable[[], None], cache: Any
    ) -> None:
        self.cache = cache
        self._inputs = {name: each.clone() for name, each in inputs.items()}
        self._replay, self._output = record(lambda: run(self._inputs), rewind)

    def __call__(self, inputs: Tensors) -> Tensor:
        """Hidden states [B, 1, D] behind the last layer."""
        for name, each in inputs.items():
            self._inputs[name].copy_(each)
        self._replay()
        return self._output.clone()


class RecordedSteps:
    """Those that were recorded last."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[Any, ...], RecordedStep] = OrderedDict()

    def __call__(
        self,
        sub_network: Any,
        cache: Any,
        run: Callable[[Tensors], Tensor],
        inputs: Tensors,
        rewind: Callable[[], None],
    ) -> Tensor:
        """The step, recorded if it was not: arguments as of `RecordedStep`, and what is active."""
        shapes = tuple((name, each.shape, each.dtype) for name, each in inputs.items())
        key = (sub_network, id(cache), shapes)
        if key not in self._known:
            while len(self._known) >= MOST:
                self._known.popitem(last=False)
            self._known[key] = RecordedStep(run, inputs, rewind, cache)
        self._known.move_to_end(key)
        return self._known[key](inputs)
