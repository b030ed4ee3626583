"""Passes of compiled widths: decoder layers whose two branches are looked up by block and width, and run."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers.cache_utils import StaticLayer

from flextron_lit.elastic.adapters import hooked
from flextron_lit.elastic.compiled.branch import Branch, named_weights, structure
from flextron_lit.elastic.compiled.packages import Code, Names, Tensors, aot_inductor, traced, weights_read
from flextron_lit.elastic.compiled.recorded_steps import RecordedSteps
from flextron_lit.elastic.compiled.with_gradients import trainable
from flextron_lit.elastic.kv_cache import retract
from flextron_lit.elastic.remote_code.flextron_layers import pass_over
from flextron_lit.files.ranks import tell
from flextron_lit.space import SubNetwork

if TYPE_CHECKING:
    from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock

NOTHING_TO_BLOCKS = {"position_ids", "cache_position", "use_cache"}
"""What a layer is told beside what its blocks compute with."""
Key = tuple[Any, ...]
"""All that a graph depends on but the block and its width: kind of pass, types, devices."""


@dataclass(frozen=True)
class Compilation:
    """One branch at one width, compiled or found on disk."""

    block: str
    """That it was first needed for."""
    width: int
    phase: str
    """`decode`: passes of one token; `prefill`: of any number above; `training`: with gradients."""
    seconds: float
    """For training without what torch takes at the first pass."""
    from_disk: bool


class CompiledWidths:
    """What a network has compiled so far: a branch is compiled when its width is first asked for.

    Args:
        backbone: the elastic network, as it is to stay: layers that something is put on or in later run as they are.
        graphs: record decode steps as CUDA graphs.

    Raises:
        ValueError: if graphs are wanted without a GPU.
    """

    def __init__(self, backbone: ElasticBackbone, *, graphs: bool = False) -> None:
        if graphs and backbone.model.device.type != "cuda":
            raise ValueError(f"graphs are CUDA graphs, but the network is on {backbone.model.device}; leave them out")
        self.backbone = backbone
        self.compilations: list[Compilation] = []
        self.eager: Counter[str] = Counter()
        """Why layers ran as they are, and how often."""
        self._known: dict[Key, tuple[Code, Names]] = {}
        self._lock = threading.Lock()
        parts = zip(backbone.layers, backbone.blocks[::2], backbone.blocks[1::2], strict=True)
        self._layers = [CompiledLayer(self, *each) for each in parts]
        self._steps = RecordedSteps() if graphs else None
        self._this_pass = threading.local()
        for layer, compiled in zip(backbone.layers, self._layers, strict=True):
            # where torch looks for what `Module.compile` makes; copies and pickles leave it out
            layer._compiled_call_impl = compiled

    @property
    def seconds(self) -> float:
        """Time that compiling has taken, and finding what was compiled before."""
        return sum(row.seconds for row in self.compilations)

    def undo(self) -> None:
        """Have the layers run as they are again."""
        for layer in self.backbone.layers:
            layer._compiled_call_impl = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have the layers run as they are inside."""
        own = [layer._compiled_call_impl for layer in self.backbone.layers]
        self.undo()
        try:
            yield
        finally:
            for layer, call in zip(self.backbone.layers, own, strict=True):
                layer._compiled_call_impl = call

    def run(self, layer: CompiledLayer, given: dict[str, Any]) -> Tensor | None:
        """A layer of a pass, of what it is told by name; None if it has to run as it is.

        A recorded step is that of all layers: the first one runs it, the others hand on what they are given.
        """
        if self._steps is not None and layer is self._layers[0]:
            whole = given["hidden_states"].shape[1] == 1 and given.get(layer.cache) is not None
            self._this_pass.recorded = whole and not any(each.why_not(given) for each in self._layers)
            if self._this_pass.recorded:
                return self._step(self._steps, given, layer.cache)
        if self._steps is not None and self._this_pass.recorded:
            handed: Tensor = given["hidden_states"]
            return handed
        why = layer.why_not(given)
        if why is not None:
            self.note(why)
            return None
        return layer.compute(given)

    def _step(self, steps: RecordedSteps, given: dict[str, Any], cache: str) -> Tensor:
        positions = given.get("position_embeddings")
        inputs = {"hidden_states": given["hidden_states"], "attention_mask": given.get("attention_mask")}
        inputs |= {} if positions is None else dict(zip(("cos", "sin"), positions, strict=True))

        def all_layers(held: Tensors) -> Tensor:
            told = {**given, "attention_mask": held.get("attention_mask")}
            if positions is not None:
                told["position_embeddings"] = held["cos"], held["sin"]
            hidden = held["hidden_states"]
            for layer in self._layers:
                hidden = layer.compute({**told, "hidden_states": hidden})
            return hidden

        there = {name: each for name, each in inputs.items() if each is not None}
        past, selection = given[cache], self.backbone.selection.current
        return steps(selection, past, all_layers, there, lambda: retract(past, 1))

    def note(self, why: str) -> None:
        """A layer ran as it is, for this reason, which is said once."""
        self.eager[why] += 1
        if self.eager[why] == 1:
            tell(f"not compiled: {why}")

    def code(self, branch: BoundBranch, width: int, inputs: Tensors, key: Key) -> tuple[Code, Names]:
        """The code of a branch at a width, and the weights that it reads; layers that are alike share it."""
        config = self.backbone.model.config
        alike = (branch.structure, width, key, config._attn_implementation)
        # all that computing may depend on: where the weights lay is none of it
        settings = config.to_dict() | {"_name_or_path": None}
        with self._lock:
            if alike not in self._known:
                begun = time.monotonic()
                if branch.learns:
                    found, weights, made = *branch.for_training(width, inputs), True
                    phase = "training"
                else:
                    what, device = [str(alike), settings], inputs["hidden"].device
                    found, weights, made = aot_inductor(what, device, lambda: branch.graph(width, inputs))
                    phase = "decode" if inputs["hidden"].shape[1] == 1 else "prefill"
                self._known[alike] = found, weights
                took = time.monotonic() - begun
                self.compilations.append(Compilation(branch.elastic.block.name, width, phase, took, not made))
                if made and not branch.learns:
                    tell(f"compiled {branch.elastic.block.kind} of width {width} for {phase}: {took:.0f} s, once")
            return self._known[alike]


class BoundBranch:
    """A block with its norm, and where it finds code and weights for the widths and kinds of passes seen so far."""

    def __init__(self, widths: CompiledWidths, elastic: ElasticBlock, norm: nn.Module) -> None:
        self.widths = widths
        self.elastic = elastic
        self.block: Any = elastic.module
        self.norm = norm
        self.structure = structure(norm), structure(elastic.module)
        self._children = tuple(self.block._modules.values())
        self._ready: dict[Key, tuple[Code, list[tuple[dict[str, Any], str]]]] = {}

    @property
    def as_it_was(self) -> bool:
        """Whether nothing was replaced or hooked since, which compiled code would pass by."""
        children = tuple(self.block._modules.values())
        return children == self._children and not any(map(hooked, (self.block, self.norm, *children)))

    def run(self, width: int, inputs: Tensors, key: Key) -> Tensor:
        """`base + block(norm(hidden))` at a width above 0."""
        wanted = (width, key)
        if wanted not in self._ready:
            code, names = self.widths.code(self, width, inputs, key)
            self._ready[wanted] = code, [self._place(name) for name in names]
        code, places = self._ready[wanted]
        return code([*inputs.values(), *(tensors[name] for tensors, name in places)])[0]

    @property
    def learns(self) -> bool:
        """Whether gradients are wanted, or it is training: all else is compiled ahead, and kept."""
        return torch.is_grad_enabled() or self.block.training

    def for_training(self, width: int, inputs: Tensors) -> tuple[Code, Names]:
        """Code that gradients go through, and the weights that it takes."""
        names = self.graph(width, {name: each.detach() for name, each in inputs.items()})[1]
        return trainable(Branch(self.block, self.norm, width, tuple(inputs), names)), names

    def graph(self, width: int, inputs: Tensors) -> tuple[ExportedProgram, Names]:
        """What is compiled, and the names of the weights that it reads."""
        weights = named_weights(self.block, self.norm)
        branch = Branch(self.block, self.norm, width, tuple(inputs), tuple(weights))
        program = traced(branch, inputs, weights)
        read = weights_read(program, branch)
        if read != branch.weights:
            branch.weights = read
            program = traced(branch, inputs, weights)
        return program, read

    def _place(self, name: str) -> tuple[dict[str, Any], str]:
        """Where a weight is found at every pass, whatever was put there since."""
        part, _, path = name.partition(".")
        owner, _, leaf = path.rpartition(".")
        module = (self.block if part == "block" else self.norm).get_submodule(owner)
        return (module._parameters if leaf in module._parameters else module._buffers), leaf


class CompiledLayer:
    """Called in the place of a decoder layer.

    Args:
        widths: what it is a part of.
        layer: the decoder layer.
        attention: its attention.
        mlp: its MLP.
    """

    def __init__(self, widths: CompiledWidths, layer: nn.Module, attention: ElasticBlock, mlp: ElasticBlock) -> None:
        self.widths = widths
        self.layer = layer
        self._children = tuple(layer._modules.values())
        self._names = tuple(signature(type(layer).forward).parameters)[1:]
        norms = (layer.get_submodule(each.elastic_class.norm) for each in (attention, mlp))
        self._attention, self._mlp = map(BoundBranch, (widths, widths), (attention, mlp), norms)
        self._parallel = widths.backbone.family.parallel(widths.backbone.model.config)
        self.cache: str = self._attention.block.cache
        self._computed_with = {"hidden_states", "attention_mask", "position_embeddings", self.cache}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer; compiled if it can be."""
        found = self.widths.run(self, dict(zip(self._names, args, strict=False)) | kwargs)
        return self.layer._call_impl(*args, **kwargs) if found is None else found

    def compute(self, given: Mapping[str, Any]) -> Tensor:
        """Both branches compiled, [B, T, D]."""
        hidden = given["hidden_states"].contiguous()
        alone = tuple(size == 1 for size in hidden.shape[:2])
        key = (alone, hidden.dtype, hidden.device, torch.get_num_threads(), *_wanted(self.layer, hidden.device))
        between = self._attended(hidden, given, key)
        width = self._mlp.block.elastic.width(hidden)
        if not width:
            return between
        return self._mlp.run(width, {"hidden": hidden, "base": between} if self._parallel else {"hidden": between}, key)

    def _attended(self, hidden: Tensor, given: Mapping[str, Any], key: Key) -> Tensor:
        block, cache = self._attention.block, given.get(self.cache)
        width, place = block.elastic.width(hidden), block.layer_idx
        if not width:
            pass_over(cache, place, hidden)
            return hidden
        inputs = {"hidden": hidden}
        mask, positions = given.get("attention_mask"), given.get("position_embeddings")
        if mask is not None:
            inputs["mask"] = mask.contiguous()
        if positions is not None:
            inputs |= {"cos": positions[0].contiguous(), "sin": positions[1].contiguous()}
        if cache is not None:
            layer = cache.layers[place]
            if not layer.is_initialized:
                none_yet = hidden.new_empty(hidden.shape[0], width, 0, self._attention.elastic.head_dim)
                layer.lazy_initialization(none_yet, none_yet)
            inputs |= {"keys": layer.keys, "values": layer.values, "filled": layer.cumulative_length}
        kinds = tuple((name, each.dtype, each.shape[:1] == (1,)) for name, each in inputs.items())
        return self._attention.run(width, inputs, (key, kinds))

    def why_not(self, given: Mapping[str, Any]) -> str | None:
        """Why the layer has to run as it is; None if it need not."""
        if not isinstance(self.widths.backbone.selection.current, SubNetwork):
            return "a policy, which chooses widths for every token"
        same = tuple(self.layer._modules.values()) == self._children and not hooked(self.layer)
        if not (same and self._attention.as_it_was and self._mlp.as_it_was):
            return "layers that something was put on or in since: hooks, adapters, other modules (compile again)"
        for name, each in given.items():
            beside = name in NOTHING_TO_BLOCKS or name in self._computed_with
            if not beside and each is not None and each is not False:
                return f"passes that are told {name}"
        return self._why_not_cached(given.get(self.cache), given["hidden_states"].shape[1])

    def _why_not_cached(self, cache: Any, tokens: int) -> str | None:
        if cache is None:
            return None
        # one that grows has no more layers than were read
        own = next(iter(cache.layers[self._attention.block.layer_idx :]), None)
        if type(own) is not StaticLayer:
            return "a KV cache that is not static (cache_implementation='static'), or has a sliding window"
        return "a prompt as long as its static cache" if 1 < own.max_cache_len <= tokens else None


def _wanted(layer: nn.Module, device: torch.device) -> tuple[bool, bool, torch.dtype | None]:
    """What is on around a pass: training, gradients, and the type that it casts to by itself."""
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return layer.training, torch.is_grad_enabled(), cast
