"""Bytes of all tensors of a step by what they are, where in the step they are most, and the step's FLOPs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils.flop_counter import flop_registry

LOGITS = "Logits"
NAMES = {
    _MemRefType.PARAM: "parameters",
    _MemRefType.GRAD: "gradients",
    _MemRefType.OPT: "optimizer",
    LOGITS: "logits",
}
"""What all else is called `activations`: buffers, the batch, and whole layers of a shared-out network among it."""
ENDS = (0, 1, -2, -1)
"""Layers whose visits are kept apart: where layers are alike, those between take no more than these."""
BETWEEN = 2
Segment = tuple[int, int]
"""Of a step, in which it visits a layer: the how manieth sweep over the layers, and which of `ENDS`, or `BETWEEN`."""
UPDATE: Segment = (-1, 0)
SHAPES: Any = ShardingPropagator
"""What torch works out shapes of shared-out tensors by; it takes a lock meanwhile."""
ATEN = torch.ops.aten
FLOPS = {
    **flop_registry,
    # the processor's kernels, which torch's counter lacks: the same shapes
    ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATEN._scaled_dot_product_flash_attention],
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATEN._scaled_dot_product_flash_attention_backward
    ],
}


class Pause:
    """While torch works shapes out on tensors as large as the whole network's, which are never there."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: Any) -> None:
        self.on = False


class TrackedBytes(MemTracker):
    """Torch's memory tracker, with peaks by segment of a step; as a context around one step.

    It tells gradients and logits apart, and lets modules run more than once, which torch's own refuses.

    Args:
        vocab_size: V; what ends in a dimension of it are logits, or made of them.
        layers: of every network that runs.
    """

    def __init__(self, vocab_size: int, layers: Iterable[Iterable[nn.Module]]) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.peaks: dict[Segment, dict[str, int]] = {}
        """By segment the bytes of each kind, at the moment of it when all of them are most."""
        self.flops = 0
        """Of matrix products and attention, two a multiplication, as torch's counter counts them."""
        self._ref_class: Any = [*_MemRefType, LOGITS]
        self._most: dict[Segment, int] = {}
        self._sweep, self._layer, self._step = 0, 0, 0
        self._segments: tuple[Segment, ...] = ((0, 0),)
        self._trained: list[nn.Parameter] = []
        self._pause = Pause()
        for network in layers:
            self._watch([*network])

    def _ignore(self, *_: Any) -> None:
        return

    # the original's take stock of each module, once
    _pre_fw_hook: Any = _ignore
    _post_fw_hook: Any = _ignore
    _pre_bw_hook: Any = _ignore
    _post_bw_hook: Any = _ignore

    def track_external(self, *external: Any) -> None:
        """As torch's; gradients of modules that are given are told apart from other tensors."""
        super().track_external(*external)
        for each in external:
            if isinstance(each, nn.Module):
                self._trained += [parameter for parameter in each.parameters() if parameter.requires_grad]
            elif isinstance(each, torch.optim.Optimizer):
                each.register_step_pre_hook(self._at_update)

    # --- where a step is ----------------------------------------------------------------------------------------

    def _watch(self, network: list[nn.Module]) -> None:
        for index, layer in enumerate(network):
            visit = self._visitor(index, len(network))
            layer.register_forward_pre_hook(visit)

            def on_output(_: nn.Module, __: Any, output: Any, visit: Callable[..., None] = visit) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.requires_grad:
                    hidden.register_hook(visit)

            layer.register_forward_hook(on_output)

    def _visitor(self, index: int, of: int) -> Callable[..., None]:
        def visit(*_: Any) -> None:
            if index == self._layer:
                return
            step = index - self._layer
            if abs(step) > 1 or self._step not in (0, step):
                self._sweep += 1
            self._layer, self._step = index, step if abs(step) == 1 else 0
            ends = [end for end in ENDS if end in (index, index - of)] or [BETWEEN]
            self._enter(*((self._sweep, end) for end in ends))

        return visit

    def _at_update(self, *_: Any) -> None:
        self._enter(UPDATE)

    def _enter(self, *segments: Segment) -> None:
        self._segments = segments
        for parameter in self._trained:
            if parameter.grad is not None:
                self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

    # --- what there is ------------------------------------------------------------------------------------------

    def __enter__(self) -> Any:
        self._lock, SHAPES._fake_mode_lock = SHAPES._fake_mode_lock, self._pause
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        SHAPES._fake_mode_lock = self._lock

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._pause.on:
            return func(*args, **kwargs or {})
        # fake tensors refuse generators, and nothing is drawn
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "generator"}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        count = FLOPS.get(func._overloadpacket)
        if count is not None and result is not NotImplemented:
            self.flops += int(count(*args, **kwargs, out_val=result))
        return result

    def _track(self, reftype: Any, t: Tensor) -> None:
        logits = t.dim() > 1 and t.shape[-1] == self.vocab_size
        super()._track(LOGITS if logits else reftype, t)  # type: ignore[arg-type]

    def _update_peak_stats(self, peak_state: Any) -> None:
        for found in self._curr_mem_snap.values():
            for segment in self._segments:
                if self._most.get(segment, 0) < found["Total"]:
                    self._most[segment] = found["Total"]
                    self.peaks[segment] = _named(found)


def _named(found: Mapping[Any, int]) -> dict[str, int]:
    kinds = dict.fromkeys((*NAMES.values(), "activations"), 0)
    for kind, size in found.items():
        if kind != "Total":
            kinds[NAMES.get(kind, "activations")] += size
    return kinds
