"""Which Hugging Face class holds a sub-network on disk: a stock one where it can, else one of ours, copied along."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM, PreTrainedConfig, PreTrainedModel

from flextron_lit.elastic import remote_code
from flextron_lit.elastic.families.base import uniform_config
from flextron_lit.export.small_model import SmallModel

OF_A_CLASS = ("model_type", "architectures", "transformers_version", "auto_map", "per_layer_config")
"""What a config says of its own class, not of the model."""
ONLY_LLAMA = ("attention_bias", "mlp_bias", "pretraining_tp")
"""Fields of Llama's config that Mistral's does not know."""
MODELING = "modeling_flextron_"
OWN = [each.name.removeprefix(MODELING) for each in iter_modules(remote_code.__path__) if MODELING in each.name]
"""Families with a class of ours that holds every sub-network, by the `model_type` of the full network."""
NEURONS = {"gpt2": "n_inner", "gpt_neox": "intermediate_size"}
"""Families whose head size follows from the number of heads, which therefore stays; what their configs call neurons."""


def in_stock_class(small: SmallModel) -> PreTrainedModel:
    """The model in a class that transformers has: that of the full network, or Mistral's for a Llama.

    Without a sliding window Mistral computes exactly what a Llama without biases does, but its config does not demand
    that the heads divide the hidden size.

    Raises:
        ValueError: if none can hold it; the message says why.
    """
    if small.in_stock_class:
        return small.model
    reason = _why_not_stock(small)
    if reason is not None:
        raise ValueError(f"no stock class holds this sub-network: {reason}; take --format remote-code or hf")
    fields = _common(small.dense, (*OF_A_CLASS, *ONLY_LLAMA))
    fields |= uniform_config(small.dense, small.groups[0], small.neurons[0])
    return _rebuilt(small, MistralForCausalLM, MistralConfig(**fields | {"sliding_window": None}))


def in_own_class(small: SmallModel) -> PreTrainedModel:
    """The model in a class of ours, whose file `save_pretrained` copies beside the weights.

    Raises:
        ValueError: if there is none for the family.
    """
    if small.family not in OWN:
        raise ValueError(f"there is no class of ours for {small.family}; there are those for {', '.join(OWN)}")
    module = import_module(f"{remote_code.__name__}.{MODELING}{small.family}")
    own: Any = getattr(module, f"Flextron{type(small.model).__name__}")
    own.config_class.register_for_auto_class()
    own.register_for_auto_class("AutoModelForCausalLM")
    layers = {}
    for layer, (groups, neurons) in enumerate(zip(small.groups, small.neurons, strict=True)):
        widths = {name: width for name, width in _layer_fields(small, groups, neurons).items() if width}
        skipped = {small.paths["attention"]: groups == 0, small.paths["mlp"]: neurons == 0}
        layers[layer] = widths | {"skip": [path for path, is_skipped in skipped.items() if is_skipped]}
    # the size of a head follows from no layer's own number of heads
    fields = _common(small.dense, OF_A_CLASS) | {"head_dim": small.head_dim, "per_layer_config": layers}
    return _rebuilt(small, own, own.config_class(**fields))


def in_any_class(small: SmallModel) -> PreTrainedModel:
    """The model in a stock class if one holds it, else in one of ours.

    Raises:
        ValueError: if there is neither.
    """
    stock = small.in_stock_class or _why_not_stock(small) is None
    return in_stock_class(small) if stock else in_own_class(small)


def _why_not_stock(small: SmallModel) -> str | None:
    """Why no stock class holds a model that the class of the full network does not; None if another one does."""
    if small.skips:
        return "it skips blocks"
    if not small.uniform:
        return "its layers differ in width"
    name = small.family
    heads = small.groups[0] * small.heads_per_group
    if name != "llama":
        return f"{name} takes the size of a head from their number, so it cannot have {heads} heads only"
    if any(getattr(small.dense, field, False) for field in ("attention_bias", "mlp_bias")):
        return (
            f"Llama's config demands that the number of heads, {heads}, divides the hidden size, "
            f"{small.dense.hidden_size}, and Mistral, which does not, has no biases"
        )
    return None


def _layer_fields(small: SmallModel, groups: int, neurons: int) -> dict[str, Any]:
    """Config fields of one layer of a class of ours; 0 where it skips."""
    if small.family in NEURONS:
        return {"num_key_value_heads": groups, NEURONS[small.family]: neurons}
    return uniform_config(small.dense, groups, neurons)


def _common(config: PreTrainedConfig, without: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a config that say what the model is."""
    return {name: value for name, value in config.to_dict().items() if name not in without}


def _rebuilt(small: SmallModel, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """The same weights in another class; they are not copied."""
    with torch.device("meta"):
        model = model_class(config)
    # strict: every weight has its place and every place its weight
    model.load_state_dict(small.model.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = small.model.generation_config
    return model.eval()
