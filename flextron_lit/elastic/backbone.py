"""A stock Hugging Face causal LM made elastic in place, and exactly undone."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from flextron_lit.elastic.adapters import plain
from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.compensation import ATTRIBUTE, Compensation
from flextron_lit.elastic.compiled.widths import CompiledWidths
from flextron_lit.elastic.families import BlockHandle, ElasticModule, Family, family_of
from flextron_lit.elastic.passes import begin_passes, end_passes
from flextron_lit.elastic.prefix import weight_of
from flextron_lit.elastic.selection import ActiveSelection, Selection
from flextron_lit.space import Block, ElasticSpace, SpaceConfig, check_skips, resolve

BUDGETS = "flextron"
"""Attribute of a model that answers budgets (`FlextronModel`), which nothing that is stock again keeps."""
WRAPPERS = {"base_layer", "original_module"}
"""What peft calls the layers that it puts something on, or in the place of."""
WRAPPED = re.compile(rf"\.({'|'.join(WRAPPERS)})(?=\.)")


@dataclass(frozen=True)
class ElasticBlock:
    """An elastic block of a model: its entry in the space, its module, and what that becomes in its family."""

    block: Block
    elastic_class: type[ElasticModule]
    module: nn.Module

    @property
    def tensors(self) -> Iterator[tuple[Axis, Tensor]]:
        """The tensors that carry units, with where they carry them; biases that the model lacks are left out."""
        found = ((axis, self._tensor(axis.tensor)) for axis in self.elastic_class.axes())
        return ((axis, tensor) for axis, tensor in found if tensor is not None)

    @property
    def shared(self) -> Iterator[Tensor]:
        """The tensors that every width uses whole."""
        found = map(self._tensor, (*self.elastic_class.shared, f"{self.elastic_class.outer}.bias"))
        return (tensor for tensor in found if tensor is not None)

    def _tensor(self, name: str) -> Tensor | None:
        """A tensor by its path in the stock module, whatever adapters sit on its layer; None if the model lacks it."""
        layer, _, leaf = name.rpartition(".")
        return getattr(plain(self.module.get_submodule(layer)), leaf, None)

    @property
    def output(self) -> nn.Module:
        """The sub-module that reads the units' activations."""
        return self.module.get_submodule(self.elastic_class.outer)

    @property
    def outgoing(self) -> Tensor:
        """The weight of `output` with what it reads first, [units x rows of a unit, D]."""
        return weight_of(self.output).t()

    @property
    def compensation(self) -> Compensation:
        """What makes up for the units that narrower widths leave out."""
        return cast(Compensation, getattr(self.module, ATTRIBUTE))

    @property
    def rows(self) -> int:
        """Rows of a unit in what `output` reads: 1 for a neuron, those of all its query heads for a KV group."""
        return len(self.outgoing) // self.block.full

    @property
    def heads_per_unit(self) -> int:
        """Query heads of a KV group; 1 for a neuron."""
        if self.block.kind == "mlp":
            return 1
        return self.rows // self.head_dim

    @property
    def head_dim(self) -> int:
        """Rows of an attention head."""
        return int(cast(Any, self.module).head_dim)

    @property
    def window(self) -> int | None:
        """How many tokens a token attends to, itself the last of them; None means all before it."""
        return cast(Any, self.module).sliding_window


class ElasticBackbone:
    """The elastic network: one set of weights, any of its nested sub-networks at a time.

    The model keeps its class, parameters, names, `generate`, caches and `save_pretrained`; only its MLP and attention
    modules change class, to subclasses that take prefix views of their weights. Outside `use` it is the full network.

    Args:
        model: a dense causal LM of a supported family, not quantised, sharded or hooked.
        space: the width choices, as written or already resolved for this model.

    Raises:
        ValueError: if the model's class is not supported, a module is not what its family expects, or the space does
            not fit; the model is then untouched.
    """

    def __init__(self, model: PreTrainedModel, space: SpaceConfig | ElasticSpace | None = None) -> None:
        family = family_of(model)
        self.model = model
        self.family = family
        self.space = _fit_space(space or SpaceConfig(), family, model)
        self.selection = ActiveSelection(self.space, self._refuse_replaced)
        self.blocks = tuple(match(model, family, self.space))
        _check(model, self.blocks)
        self.layers: list[Any] = list(cast(Any, model.get_submodule(family.layers)))
        self._names = frozenset(name for name, _ in model.named_parameters())
        for index, elastic in enumerate(self.blocks):
            # the class alone changes: a new module would lose hooks, device and names, and need weights of its own
            elastic.module.__class__ = elastic.elastic_class
            elastic.module.elastic = BlockHandle(index, elastic.block.full, self.selection)  # type: ignore[assignment]
            setattr(elastic.module, ATTRIBUTE, Compensation())
        self.compiled: CompiledWidths | None = None
        """The code that passes run by, if they do."""
        begin_passes(model, self.selection)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which run as they are: compiled code is of this process."""
        return {**vars(self), "compiled": None}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of the full network, by name in the model; narrower widths may have more of their own, and adapters."""
        named = ((WRAPPED.sub("", name), each) for name, each in self.model.named_parameters())
        return {name: each for name, each in named if name in self._names}

    @property
    def compensations(self) -> dict[str, nn.Parameter]:
        """Those that narrower widths alone use, by name in the model."""
        return {name: each for name, each in self.model.named_parameters() if f".{ATTRIBUTE}." in name}

    @property
    def adapted(self) -> bool:
        """Whether adapters sit on any layer; a network that carries some is not what routers were trained for."""
        return any(WRAPPERS & module._modules.keys() for module in self.model.modules())

    def refuse_foreign(self) -> None:
        """Refuse what a saved folder would not hold.

        Raises:
            ValueError: if adapters are in place, or a block or a projection is not the one that became elastic.
        """
        if self.adapted:
            raise ValueError(
                "adapters are in place, which no Flextron checkpoint holds: merge them first (merge_and_unload), or "
                "save the adapters alone (save_pretrained of the PeftModel)"
            )
        self._refuse_replaced()
        for elastic in self.blocks:
            cast(ElasticModule, elastic.module).refuse_foreign()

    def _refuse_replaced(self) -> None:
        for elastic in self.blocks:
            found = self.layers[elastic.block.layer]._modules[elastic.elastic_class.path]
            if found is not elastic.module:
                raise ValueError(
                    f"{elastic.block.name} is a {type(found).__name__}, put in the place of the elastic module, which "
                    "narrower widths need; put it back"
                )

    def use(self, selection: Selection) -> AbstractContextManager[None]:
        """Make a sub-network (or a policy that chooses one) active; see `ActiveSelection.use`."""
        return self.selection.use(selection)

    def compile_widths(self, wanted: bool = True, *, graphs: bool = False) -> None:
        """Run passes by code compiled for their widths, or, unless wanted, as they are again.

        Code is compiled at the first pass that needs it, seconds each; what needs no gradients is kept for all later
        processes. What cannot be compiled runs as it is, and a line says why.

        Args:
            wanted: whether to.
            graphs: record decode steps as CUDA graphs, for each sub-network and KV cache in use; not run on a GPU yet.

        Raises:
            ValueError: if graphs are wanted without a GPU.
        """
        if self.compiled is not None:
            self.compiled.undo()
        self.compiled = CompiledWidths(self, graphs=graphs) if wanted else None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turn dropout off inside; afterwards the model trains again if it did before."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations in backward, at the widths of the forward, whatever is active by then.

        The non-reentrant kind: the other returns wrong gradients without a word when the selection changes in between.
        """
        self.model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": self.selection.recalled})

    def undo(self) -> PreTrainedModel:
        """Turn the modules back into their stock classes and return the model; weights stay as they are."""
        self.selection.set(self.space.full())
        self.compile_widths(False)
        end_passes(self.model)
        for elastic in self.blocks:
            elastic.module.__class__ = elastic.elastic_class.stock()
            del elastic.module.elastic
            delattr(elastic.module, ATTRIBUTE)
        self.model.__class__ = self.family.model
        return self.model

    def summary(self) -> str:
        """What was converted, for the log."""
        kinds = Counter((e.block.kind, e.block.widths) for e in self.blocks)
        rows = [f"{count} x {kind}: widths {list(widths)}" for (kind, widths), count in kinds.items()]
        found = f"{len(self.blocks)} blocks, {self.space.num_sub_networks:.1e} sub-networks"
        return "\n  ".join([f"{type(self.model).__name__} is elastic: {found}", *rows])


def _fit_space(space: SpaceConfig | ElasticSpace, family: Family, model: PreTrainedModel) -> ElasticSpace:
    config = model.config
    needed = cache_layers(config)
    full = {kind: each.full_width(config) for kind, each in family.blocks.items()}
    shape = {"num_layers": config.num_hidden_layers, "neurons": full["mlp"], "kv_groups": full["attention"]}
    if isinstance(space, SpaceConfig):
        return resolve(space, **shape, cache_layers=needed)
    dense = resolve(SpaceConfig(mlp=[full["mlp"]], attention=[full["attention"]]), **shape)
    found = [(b.layer, b.kind, b.full) for b in space.blocks]
    wanted = [(b.layer, b.kind, b.full) for b in dense.blocks]
    if found != wanted:
        raise ValueError(
            f"the space has {len(found)} blocks, the last {found[-1:]}; the model needs {len(wanted)}, "
            f"the last {wanted[-1:]} (layer, kind, full width): it was made for another model"
        )
    for block in space.blocks:
        check_skips(block, needed)
    return space


def cache_layers(config: PreTrainedConfig) -> set[int]:
    """Where the KV cache reads its length: the first layer of each type, with a sliding window or without.

    A skipped attention writes nothing into the cache, so there the length would stay 0.
    """
    types = getattr(config, "layer_types", None) or ["full_attention"]
    return {types.index(each) for each in types}


def match(model: PreTrainedModel, family: Family, space: ElasticSpace) -> Iterator[ElasticBlock]:
    """The elastic blocks of a model, in the order of the space."""
    layers: Any = model.get_submodule(family.layers)
    for block in space.blocks:
        elastic_class = family.blocks[block.kind]
        yield ElasticBlock(block, elastic_class, layers[block.layer].get_submodule(elastic_class.path))


def _check(model: PreTrainedModel, blocks: tuple[ElasticBlock, ...]) -> None:
    """Look at everything before anything is replaced, so that a model is never left half converted."""
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised: packed weights have no prefix; convert first, quantise after export")
    if "forward" in vars(model.base_model):
        name = model.base_model_prefix
        raise ValueError(
            f"{name} has a forward of its own (accelerate's device_map leaves one), which would hide the elastic one; "
            "load the model without device_map"
        )
    for layer in model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            raise ValueError(
                "activation checkpointing is already on, and its reentrant kind gives wrong gradients here; turn it "
                "off and call ElasticBackbone.enable_activation_checkpointing after conversion"
            )
    for elastic in blocks:
        _check_module(elastic)
        _check_parameters(elastic)


def _check_module(elastic: ElasticBlock) -> None:
    name, becomes, found = elastic.block.name, elastic.elastic_class, type(elastic.module)
    if found is becomes:
        raise ValueError(f"{name} is elastic already; undo the first conversion before the second")
    if found is not becomes.stock():
        raise ValueError(f"{name} is a {found.__name__}, but must be a stock {becomes.stock().__name__}")
    layers = {path: elastic.module.get_submodule(path) for path in (*becomes.inner, becomes.outer)}
    for path, module in {becomes.path: elastic.module, **layers}.items():
        if "forward" in vars(module) or hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{path} of {name} has a forward of its own (accelerate's device_map leaves one), which would hide "
                "the elastic one; load the model without device_map"
            )
    for path, module in layers.items():
        if type(module) is not becomes.linear:
            raise ValueError(f"{path} of {name} is a {type(module).__name__}, but must be a {becomes.linear.__name__}")
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"{path} of {name} carries forward hooks, which narrower widths pass by; remove them")


def _check_parameters(elastic: ElasticBlock) -> None:
    name, becomes = elastic.block.name, elastic.elastic_class
    known = {axis.tensor for axis in becomes.axes()} | becomes.shared | {f"{becomes.outer}.bias"}
    for path, parameter in elastic.module.named_parameters():
        if path not in known:
            raise ValueError(f"{path} of {name} is not known to its family; known are {', '.join(sorted(known))}")
        if isinstance(parameter, DTensor):
            raise ValueError(f"{path} of {name} is sharded already; convert before fully_shard")
    for axis, tensor in elastic.tensors:
        size = tensor.shape[axis.dim]
        if size % (axis.parts * elastic.block.full):
            raise ValueError(
                f"{axis.tensor} of {name} has {size} rows, which {elastic.block.full} units do not divide evenly"
            )
