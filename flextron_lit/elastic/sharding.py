"""A network's weights shared out over processes, layer by layer (FSDP2, torch's `fully_shard`).

Inside a layer's forward its weights are whole, so prefix views and what narrower widths have of their own are what they
are in one process. Outside every process holds its rows of each weight; gradients and optimizer states are of those.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, layers: str, mesh: DeviceMesh, *, bf16: bool = False) -> None:
    """Share a network out, once its layers are what they are to be: nothing can be converted or frozen afterwards.

    Args:
        model: the network.
        layers: path of its decoder layers in it.
        mesh: the processes, one dimension.
        bf16: whether layers gather their weights in bf16, as autocast computes with them; what processes hold and add
            up stays in its own type. Embeddings, last norm and head always do.
    """
    # the residual stream keeps its type: autocast says what each operation computes in
    halves = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    for layer in cast(Any, model.get_submodule(layers)):
        fully_shard(layer, mesh=mesh, mp_policy=halves if bf16 else own)
    # the rest at once, so that tied weights stay tied; torch would leave it whole behind a forward, and a step has many
    fully_shard(model, mesh=mesh, mp_policy=own, reshard_after_forward=True)


def is_shared_out(tensor: Tensor) -> bool:
    """Whether this process holds some rows of a tensor alone."""
    return isinstance(tensor, DTensor)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows, or all of one that is not shared out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; all of them ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(named: Iterable[tuple[str, Tensor]], *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """Tensors as a whole on the processor, one at a time: no device ever holds more than one of them.

    Args:
        named: by name, in the same order on every process, which all run through them together.
        keep: whether this process is the one that wants them; the others get nothing.
    """
    for name, tensor in named:
        all_of_it = whole(tensor.detach())
        if keep:
            yield name, all_of_it.cpu()
