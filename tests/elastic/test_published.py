"""The real models of every family, by their published shapes, on the meta device: nothing is fetched or allocated."""

import pytest
import torch
from transformers import (
    GemmaForCausalLM,
    GPT2LMHeadModel,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    SmolLM3ForCausalLM,
)

from flextron_lit.costs import parameter_table
from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.families import FAMILIES
from flextron_lit.space import SpaceConfig


def shape(vocab, hidden, mlp, layers, heads, groups, **others):
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        **others,
    }


# class, config, parameters as published
PUBLISHED = {
    "llama-2-7b": (LlamaForCausalLM, shape(32000, 4096, 11008, 32, 32, 32), 6_738_415_616),
    "tinyllama-1.1b": (LlamaForCausalLM, shape(32000, 2048, 5632, 22, 32, 4), 1_100_048_384),
    "mistral-7b": (MistralForCausalLM, shape(32000, 4096, 14336, 32, 32, 8), 7_241_732_096),
    "qwen2.5-0.5b": (Qwen2ForCausalLM, shape(151936, 896, 4864, 24, 14, 2, tie_word_embeddings=True), 494_032_768),
    "qwen3-0.6b": (
        Qwen3ForCausalLM,
        shape(151936, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True),
        596_049_920,
    ),
    "smollm3-3b": (SmolLM3ForCausalLM, shape(128256, 2048, 11008, 36, 16, 4), 3_075_098_624),
    "gemma-7b": (GemmaForCausalLM, shape(256000, 3072, 24576, 28, 16, 16, head_dim=256), 8_537_680_896),
    "pythia-160m": (
        GPTNeoXForCausalLM,
        {"vocab_size": 50304, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
        | {"num_attention_heads": 12},
        162_322_944,
    ),
    "gpt2": (GPT2LMHeadModel, {}, 124_439_808),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_real_model_converts_and_counts_its_published_parameters(name):
    model_class, config, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    assert sum(p.numel() for p in model.parameters()) == parameters
    backbone = ElasticBackbone(model, SpaceConfig(mlp=[0.5, 1.0], attention=[0.5, 1.0]))
    table = parameter_table(backbone)
    assert table.full == parameters
    half = backbone.space.uniform(0.5, 0.5)
    small = extract(backbone, half)
    assert {p.device.type for p in small.parameters()} == {"meta"}
    assert sum(p.numel() for p in small.parameters()) == table.cost(half)
    # blocks are most of a model but for the embeddings, and half of each is left out
    assert parameters - table.cost(half) == pytest.approx((parameters - table.fixed) / 2, rel=0.01)


def test_every_family_is_among_them():
    assert {model_class for model_class, _, _ in PUBLISHED.values()} == {family.model for family in FAMILIES}
