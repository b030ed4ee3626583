"""The Hugging Face families, all of the same shape: those with Llama's names in one file, each other in its own."""

from transformers import PreTrainedModel

from flextron_lit.elastic.families.base import BlockHandle, ElasticModule, Family
from flextron_lit.elastic.families.gpt2 import GPT2
from flextron_lit.elastic.families.gpt_neox import GPT_NEOX
from flextron_lit.elastic.families.llama import GEMMA, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA, GPT_NEOX, GPT2)


def family_of(model: PreTrainedModel) -> Family:
    """The family whose causal LM class the model has, exactly.

    Raises:
        ValueError: if no family knows the class; the message lists those that exist.
    """
    for family in FAMILIES:
        if type(model) is family.model:
            return family
    known = ", ".join(family.model.__name__ for family in FAMILIES)
    raise ValueError(f"{type(model).__name__} cannot become elastic: supported model classes are {known}")
