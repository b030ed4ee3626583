"""Ways to make a small dense model of a large one, each as its own library does it: what one would use instead.

Networks of one size are of one shape whatever the way, so latencies are measured once for each (`rival_latency.py`):
`mlp` ways leave so many neurons in every layer, `depth` ways leave so many layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

Kind = Literal["mlp", "depth"]
Blocks = Sequence[Tensor]
"""Calibration text: int64 [1, T] each."""
SLEB_BLOCKS = 2
"""It measures every layer anew for each that goes: hours, of all blocks."""


@dataclass(frozen=True)
class Way:
    """How a model becomes smaller."""

    kind: Kind
    prune: Callable[[PreTrainedModel, Blocks, int], PreTrainedModel]
    """Of a copy that it may change, the calibration text, and the neurons or layers that are left."""
    source: str
    """Whose code chooses."""


def neurons(model: PreTrainedModel) -> int:
    return model.config.intermediate_size


def layers(model: PreTrainedModel) -> int:
    return model.config.num_hidden_layers


def optipfair_mlp(model: PreTrainedModel, blocks: Blocks, left: int) -> PreTrainedModel:
    """Peak-to-peak magnitudes of gate and up projections with activation norms of the text."""
    from optipfair import prune_model

    share = 100 * (1 - left / neurons(model))
    text = [{"input_ids": block, "attention_mask": torch.ones_like(block)} for block in blocks]
    found = prune_model(model, "MLP_GLU", "MAW", share, dataloader=text, show_progress=False)
    # a percentage of floats may round to one neuron less
    assert abs(neurons(found) - left) <= 1, (neurons(found), left)
    return found


def optipfair_depth(model: PreTrainedModel, blocks: Blocks, left: int) -> PreTrainedModel:
    """The layers that turn their input least, by cosine."""
    from optipfair import analyze_layer_importance, prune_model

    text = [{"input_ids": block, "attention_mask": torch.ones_like(block)} for block in blocks]
    scores = analyze_layer_importance(model, text, show_progress=False)
    least = sorted(scores, key=scores.__getitem__)[: layers(model) - left]
    return prune_model(
        model, "DEPTH", layer_indices=sorted(least), layer_selection_method="custom", show_progress=False
    )


def economize_depth(method: str) -> Callable[[PreTrainedModel, Blocks, int], PreTrainedModel]:
    """ShortGPT or SLEB."""

    def prune(model: PreTrainedModel, blocks: Blocks, left: int) -> PreTrainedModel:
        import economize
        from economize.techniques.prune import DepthPruneConfig

        looked_at = list(blocks)[:SLEB_BLOCKS] if method == "sleb" else list(blocks)
        # in place
        economize.apply(model, DepthPruneConfig(method, layers(model) - left), calibration=looked_at)
        return model

    return prune


def taylor_mlp(model: PreTrainedModel, blocks: Blocks, left: int) -> PreTrainedModel:
    """Groups of gate, up and down rows by first-order Taylor importance, each layer alike."""
    import torch_pruning as tp

    mlps: list[Any] = [layer.mlp for layer in model.model.layers]
    for block in blocks:
        model(input_ids=block, labels=block, use_cache=False).loss.backward()
    roots = {mlp.up_proj for mlp in mlps} | {mlp.gate_proj for mlp in mlps}
    others = [each for each in model.modules() if isinstance(each, torch.nn.Linear) and each not in roots]
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=blocks[0][:, :8],
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=1 - left / neurons(model),
        ignored_layers=[each for each in others if each not in {mlp.down_proj for mlp in mlps}],
        forward_fn=lambda module, ids: module(input_ids=ids, use_cache=False).logits,
        output_transform=None,
    )
    pruner.step()
    model.zero_grad(set_to_none=True)
    model.config.intermediate_size = mlps[0].up_proj.out_features
    assert {mlp.down_proj.in_features for mlp in mlps} == {neurons(model)}, "layers of unlike widths"
    assert abs(neurons(model) - left) <= 1, (neurons(model), left)
    return model


def last_layers(model: PreTrainedModel, blocks: Blocks, left: int) -> PreTrainedModel:
    """The layers before the last one go, as recipes of mergekit's passthrough have it."""
    everyone = list(range(layers(model)))
    return only_layers(model, everyone[: left - 1] + everyone[-1:])


def only_layers(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """So many layers, in their order."""
    held: Any = model.model
    held.layers = torch.nn.ModuleList(held.layers[index] for index in kept)
    for place, layer in enumerate(held.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = len(kept)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    return model


@torch.no_grad()
def random_mlp(model: PreTrainedModel, blocks: Blocks, left: int) -> PreTrainedModel:
    """Neurons at random, the same number in every layer."""
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        kept = torch.randperm(neurons(model), generator=generator)[:left].sort().values
        for name in ("gate_proj", "up_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight, linear.out_features = torch.nn.Parameter(linear.weight[kept].clone()), left
        down = layer.mlp.down_proj
        down.weight, down.in_features = torch.nn.Parameter(down.weight[:, kept].clone()), left
    model.config.intermediate_size = left
    return model


WAYS = {
    "optipfair, MLP": Way("mlp", optipfair_mlp, "optipfair 0.4.2, PPM with activations"),
    "Torch-Pruning, MLP": Way("mlp", taylor_mlp, "torch-pruning 1.6.1, Taylor"),
    "random neurons": Way("mlp", random_mlp, "ours"),
    "economize, ShortGPT": Way("depth", economize_depth("shortgpt"), "economize 0.3.2"),
    "economize, SLEB": Way("depth", economize_depth("sleb"), "economize 0.3.2"),
    "optipfair, depth": Way("depth", optipfair_depth, "optipfair 0.4.2, cosine"),
    "plain cut of layers": Way("depth", last_layers, "as mergekit's passthrough"),
}


def pruned(way: str, model: PreTrainedModel, blocks: Blocks, left: int) -> PreTrainedModel:
    """A small copy."""
    return WAYS[way].prune(copy.deepcopy(model), blocks, left).eval()
