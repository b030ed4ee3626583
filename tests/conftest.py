"""What several tests share: one thread, a tiny model with randomised norms, its space."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.space import SpaceConfig

torch.set_num_threads(1)

VOCABULARY = 61
SPACE = SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, 1, 2, 4])

# name -> what differs from a grouped-query Llama with tied embeddings and no biases
LLAMAS = {
    "gqa": {},
    "mha": {"num_key_value_heads": 8},
    "untied": {"tie_word_embeddings": False},
    "biased": {"attention_bias": True, "mlp_bias": True},
}
ATTENTION = ("sdpa", "eager")


def make_llama(attn_implementation: str = "sdpa", **differences: object) -> LlamaForCausalLM:
    """A tiny Llama whose norms, biases and weights are all random: unit norms would hide a missed slice."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": None,
        "attn_implementation": attn_implementation,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | differences)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def space_for(model: LlamaForCausalLM) -> SpaceConfig:
    groups = model.config.num_key_value_heads
    return SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, groups // 4, groups // 2, groups])


@pytest.fixture(params=LLAMAS, scope="module")
def llama(request):
    return make_llama(**LLAMAS[request.param])


@pytest.fixture
def backbone():
    return ElasticBackbone(make_llama(), SPACE)


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


def elastic_pair(model):
    """An untouched copy and an elastic copy of a model."""
    elastic = copy.deepcopy(model)
    return model, ElasticBackbone(elastic, space_for(elastic))
