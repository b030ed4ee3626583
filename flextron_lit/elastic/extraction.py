"""A sub-network as a model of its own: small weights, stock classes, no elasticity left."""

import copy
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flextron_lit.elastic.backbone import ElasticBackbone, ElasticBlock, match
from flextron_lit.elastic.families import ElasticModule
from flextron_lit.elastic.passes import end_passes
from flextron_lit.elastic.prefix import weight_of
from flextron_lit.elastic.remote_code.flextron_layers import SkippedAttention, SkippedMLP, heads_unsaid
from flextron_lit.space import SubNetwork


def extract(backbone: ElasticBackbone, sub_network: SubNetwork) -> PreTrainedModel:
    """A stand-alone model that holds one sub-network's weights alone and computes the same (ours: basis of export).

    Its modules are the stock ones with smaller weights, contiguous copies that share nothing with the elastic network;
    skipped blocks become modules that add nothing. Where every layer has the same widths and the stock class can hold
    them, the config says so and `save_pretrained` gives a plain checkpoint; else `save_pretrained` refuses.

    Args:
        backbone: the elastic network; it stays as it is.
        sub_network: which widths to take, also heterogeneous and with skipped blocks.

    Raises:
        ValueError: if the sub-network belongs to another space.
    """
    widths = backbone.space.widths(sub_network)
    # copying takes what the memo holds for an object in its place, so the full weights are never copied
    memo: dict[int, Any] = {}
    for elastic, width in zip(backbone.blocks, widths, strict=True):
        memo[id(elastic.module.elastic)] = memo[id(elastic.compensation)] = None
        if width == 0:
            layer, kind = elastic.block.layer, elastic.block.kind
            memo[id(elastic.module)] = SkippedAttention(layer) if kind == "attention" else SkippedMLP()
        for axis, tensor in elastic.tensors:
            prefix = axis.prefix(tensor.detach(), width, elastic.block.full)
            if width and axis.tensor == f"{elastic.elastic_class.outer}.weight":
                prefix = _folded(elastic, width)
            memo[id(tensor)] = nn.Parameter(prefix.clone(), requires_grad=tensor.requires_grad)
    memo[id(backbone.selection)] = None
    model = copy.deepcopy(backbone.model, memo)
    end_passes(model)
    for elastic, width in zip(match(model, backbone.family, backbone.space), widths, strict=True):
        if width:
            _become_stock(cast(ElasticModule, elastic.module), width)
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
    output: Any = elastic.output
    own = elastic.compensation.folded(weight_of(output), width, width * elastic.rows)
    return (own.t() if isinstance(output, Conv1D) else own).contiguous()


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
    groups, neurons = set(widths[::2]), set(widths[1::2])
    if len(groups) > 1 or len(neurons) > 1 or 0 in groups | neurons:
        return None
    return backbone.family.uniform_config(backbone.model.config, *groups, *neurons)


def _refuse_to_save(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "no stock class holds these widths (they differ between layers, skip blocks, or its config cannot say them), "
        "so a saved folder would not load; keep the Flextron checkpoint and the SubNetwork instead"
    )
