"""A sub-network as a model of its own: small weights, stock classes, no elasticity left."""

import copy
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.adapters import bias_of, delta_of, is_lora, plain
from flextron_lit.elastic.backbone import BUDGETS, ElasticBackbone, ElasticBlock, match
from flextron_lit.elastic.families import ElasticModule
from flextron_lit.elastic.passes import end_passes
from flextron_lit.elastic.prefix import weight_of
from flextron_lit.elastic.remote_code.flextron_layers import SkippedAttention, SkippedMLP, heads_unsaid
from flextron_lit.space import SubNetwork

PER_LAYER = ("layer_types", "no_rope_layers")
"""Fields of configs with an entry a layer."""


def extract(backbone: ElasticBackbone, sub_network: SubNetwork) -> PreTrainedModel:
    """A stand-alone model that holds one sub-network's weights alone and computes the same (ours: basis of export).

    Its modules are the stock ones with smaller weights, contiguous copies that share nothing with the elastic network;
    layers that are skipped as a whole are gone, other skipped blocks become modules that add nothing; LoRA adapters on
    elastic projections are merged into the copies.
    Where every layer has the same widths and the stock class can hold them, the config says so and `save_pretrained`
    gives a plain checkpoint; else `save_pretrained` refuses.

    Args:
        backbone: the elastic network; it stays as it is.
        sub_network: which widths to take, also heterogeneous and with skipped blocks.

    Raises:
        ValueError: if the sub-network belongs to another space, or a layer carries something that it cannot take along.
    """
    _refuse_adapters_elsewhere(backbone)
    widths = backbone.space.widths(sub_network)
    # copying takes what the memo holds for an object in its place, so the full weights are never copied
    memo: dict[int, Any] = {id(vars(backbone.model).get(BUDGETS)): None}
    for elastic, width in zip(backbone.blocks, widths, strict=True):
        memo[id(elastic.module.elastic)] = memo[id(elastic.compensation)] = None
        if width == 0:
            index, kind = elastic.block.layer, elastic.block.kind
            memo[id(elastic.module)] = SkippedAttention(index) if kind == "attention" else SkippedMLP()
        cast(ElasticModule, elastic.module).refuse_foreign()
        for axis, tensor in elastic.tensors:
            layer, _, leaf = axis.tensor.rpartition(".")
            if width and leaf == "weight" and layer == elastic.elastic_class.outer:
                prefix = _folded(elastic, width)
            else:
                merged = _merged(elastic.module.get_submodule(layer), tensor.detach(), leaf)
                prefix = axis.prefix(merged, width, elastic.block.full)
            memo[id(tensor)] = nn.Parameter(prefix.clone(), requires_grad=tensor.requires_grad)
        _without_wrappers(elastic, memo)
    memo[id(backbone.selection)] = None
    model = copy.deepcopy(backbone.model, memo)
    end_passes(model)
    model.__class__ = backbone.family.model
    vars(model).pop(BUDGETS, None)
    for elastic, width in zip(match(model, backbone.family, backbone.space), widths, strict=True):
        if width:
            _become_stock(cast(ElasticModule, elastic.module), width)
    _keep_layers(model, backbone.family.layers, kept_layers(backbone, widths))
    fields = stock_fields(backbone, widths)
    if fields is None:
        model.save_pretrained = _refuse_to_save  # type: ignore[method-assign]
        model._get_static_cache_init_shape = heads_unsaid  # type: ignore[assignment]
        return model
    for name, value in fields.items():
        setattr(model.config, name, value)
    return model


@torch.no_grad()
def _folded(elastic: ElasticBlock, width: int) -> Tensor:
    """What a width reads its units with, as the block's output layer holds weights."""
    output, owns = elastic.output, elastic.compensation.owns(width)
    delta = delta_of(output, those_merged=owns)
    own = elastic.compensation.folded(weight_of(output), width, width * elastic.rows, delta)
    return (own.t() if isinstance(plain(output), Conv1D) else own).contiguous()


def _without_wrappers(elastic: ElasticBlock, memo: dict[int, Any]) -> None:
    """Let copies of layers that carry adapters be copies of the layers alone."""
    bias = bias_of(elastic.output)
    if bias is not None:
        memo[id(plain(elastic.output).bias)] = nn.Parameter(bias.detach().clone())
    for name in (*elastic.elastic_class.inner, elastic.elastic_class.outer):
        layer = elastic.module.get_submodule(name)
        if is_lora(layer):
            memo[id(layer)] = copy.deepcopy(plain(layer), memo)


@torch.no_grad()
def _merged(layer: nn.Module, tensor: Tensor, leaf: str) -> Tensor:
    """A weight or bias of a layer, with what its active adapters add."""
    if leaf == "bias":
        return cast(Tensor, bias_of(layer))
    delta = delta_of(layer)
    if delta is None:
        return tensor
    return (tensor + (delta.t() if isinstance(plain(layer), Conv1D) else delta)).to(tensor.dtype)


def _refuse_adapters_elsewhere(backbone: ElasticBackbone) -> None:
    within = {id(module) for elastic in backbone.blocks for module in elastic.module.modules()}
    for name, module in backbone.model.named_modules():
        if id(module) not in within and hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} carries an adapter but lies outside the elastic blocks; merge it first (merge_and_unload)"
            )


def _become_stock(module: ElasticModule, width: int) -> None:
    module.narrow(width)
    del module.elastic, module.compensation
    for path in (*module.inner, module.outer):
        layer: Any = module.get_submodule(path)
        if isinstance(layer, Conv1D):
            layer.nx, layer.nf = layer.weight.shape
        else:
            layer.out_features, layer.in_features = layer.weight.shape
    module.__class__ = type(module).stock()  # type: ignore[assignment]


def stock_fields(backbone: ElasticBackbone, widths: tuple[int, ...]) -> dict[str, Any] | None:
    """Config fields by which the class of the full network holds these widths, one a block; None if it cannot."""
    # blocks alternate
    kept = kept_layers(backbone, widths)
    groups, neurons = ({widths[2 * layer + kind] for layer in kept} for kind in (0, 1))
    if len(groups) > 1 or len(neurons) > 1 or 0 in groups | neurons:
        return None
    return backbone.family.uniform_config(backbone.model.config, *groups, *neurons)


def kept_layers(backbone: ElasticBackbone, widths: tuple[int, ...]) -> list[int]:
    """The layers that a model of these widths has: not those that skip both blocks, unless their place counts."""
    layers = range(len(widths) // 2)
    if getattr(backbone.model.config, "scale_attn_by_inverse_layer_idx", False):
        return list(layers)
    return [layer for layer in layers if any(widths[2 * layer : 2 * layer + 2])]


def keep_layers_of(config: PreTrainedConfig, kept: Sequence[int]) -> None:
    """Let a config speak of these layers alone, in place."""
    config.num_hidden_layers = len(kept)
    for name in PER_LAYER:
        each = getattr(config, name, None)
        if each is not None:
            setattr(config, name, [each[layer] for layer in kept])


def _keep_layers(model: PreTrainedModel, path: str, kept: Sequence[int]) -> None:
    parent, _, name = path.rpartition(".")
    layers: Any = model.get_submodule(path)
    if len(kept) == len(layers):
        return
    setattr(model.get_submodule(parent), name, nn.ModuleList(layers[layer] for layer in kept))
    keep_layers_of(model.config, kept)
    for index, layer in enumerate(kept):
        for module in layers[layer].modules():
            # where it finds its part of the KV cache
            if hasattr(module, "layer_idx"):
                module.layer_idx = index


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "no stock class holds these widths (they differ between layers, skip blocks, or its config cannot say them), "
        "so a saved folder would not load; keep the Flextron checkpoint and the SubNetwork instead"
    )
