"""A step of a stage on tensors without content: what it takes on one process, extrapolated from a few layers (ours).

The stage's own step runs, with torch's fake tensors and, where the network is shared out, its fake process group; so
what it takes follows from what it does and not from formulas.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from flextron_lit.elastic.sharding import own_part
from flextron_lit.planning.asked import Shape, TrainingSettings
from flextron_lit.planning.stand_ins import StandIn
from flextron_lit.planning.tracked_bytes import UPDATE, TrackedBytes

FEW = (3, 4)
"""Layers of the two rehearsals: the first two, the last two, and one more in between."""
Make = Callable[[Shape, TrainingSettings, DeviceMesh | None], StandIn]


@dataclass(frozen=True)
class Rehearsal:
    """What one step of one process took."""

    held: Mapping[str, float]
    """Bytes that are there before the step: `network`, `own_projections`, `original`, `optimizer`."""
    peaks: Mapping[tuple[int, int], Mapping[str, float]]
    """Bytes of each kind, by segment of the step, at the moment of it when all of them are most."""
    flops: float
    tokens: int
    processes: int = 1
    """That share the network out."""

    def shared_by(self, processes: int) -> Self:
        """The same by another number of them: whose rows are shared out has fewer, and what else there is stays."""
        times = self.processes / processes
        shared = ("parameters", "gradients", "optimizer")
        peaks = {
            segment: {kind: size * times if kind in shared else size for kind, size in peak.items()}
            for segment, peak in self.peaks.items()
        }
        held = {name: size * times for name, size in self.held.items()}
        return replace(self, held=held, peaks=peaks, processes=processes)

    def parts(self) -> dict[str, float]:
        """Bytes at the peak of the step, by what they are; `update` is what an update takes beside all else."""
        segment, peak = max(self.peaks.items(), key=lambda each: sum(each[1].values()))
        found = {name: self.held[name] for name in ("network", "own_projections", "original")}
        # routers
        found["others"] = peak["parameters"] - sum(found.values())
        found |= {name: peak[name] for name in ("gradients", "logits", "activations")}
        found["optimizer"] = self.held["optimizer"]
        found["update"] = peak["optimizer"] - self.held["optimizer"]
        assert (segment == UPDATE) or found["update"] < 1, "only an update makes tensors of an optimizer"
        return found


def rehearse(make: Make, shape: Shape, settings: TrainingSettings, processes: int = 1) -> Rehearsal:
    """What a step takes on each of the processes that share the network out.

    Args:
        make: the stage.
        shape: of the model.
        settings: of its training.
        processes: 1 means that the network is not shared out.
    """
    layers = shape.config.num_hidden_layers
    if not shape.alike or layers <= FEW[-1]:
        return _rehearse(make, shape, settings, processes)
    few, more = (_rehearse(make, shape.with_layers(count), settings, processes) for count in FEW)

    def at(few: float, more: float) -> float:
        return few + (more - few) * (layers - FEW[0])

    def each(few: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
        return {name: at(few[name], more[name]) for name in few}

    assert few.peaks.keys() == more.peaks.keys()
    peaks = {segment: each(few.peaks[segment], more.peaks[segment]) for segment in few.peaks}
    return Rehearsal(each(few.held, more.held), peaks, at(few.flops, more.flops), few.tokens, processes)


def _rehearse(make: Make, shape: Shape, settings: TrainingSettings, processes: int) -> Rehearsal:
    with _mesh(processes) as mesh, torch.random.fork_rng(), FakeTensorMode(allow_non_fake_inputs=True):
        made = make(shape, settings, mesh)
        made.keep_states()
        tracked = TrackedBytes(shape.config.vocab_size, made.layers)
        tracked.track_external(*made.networks, *made.others, *made.optimizers, *made.batch.values())
        held = _held(made)
        with tracked:
            made.step()
    return Rehearsal(held, tracked.peaks, tracked.flops, made.batch["labels"].numel(), processes)


def _held(made: StandIn) -> dict[str, float]:
    backbone, (_, *originals) = made.backbone, made.networks
    own = {id(each) for each in backbone.compensations.values()}
    states = (state for optimizer in made.optimizers for state in optimizer.state.values())
    return {
        "network": sum(_bytes(each) for each in backbone.model.parameters() if id(each) not in own),
        "own_projections": sum(map(_bytes, backbone.compensations.values())),
        "original": sum(_bytes(each) for network in originals for each in network.parameters()),
        "optimizer": sum(_bytes(each) for kept in states for each in kept.values() if isinstance(each, torch.Tensor)),
    }


def _bytes(tensor: torch.Tensor) -> int:
    return own_part(tensor).nbytes


@contextmanager
def _mesh(processes: int) -> Iterator[DeviceMesh | None]:
    """As many processes as torch is made to believe in."""
    if processes == 1:
        yield None
        return
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield init_device_mesh("cpu", (processes,))
    finally:
        distributed.destroy_process_group()
