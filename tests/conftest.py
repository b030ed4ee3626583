"""What several tests share: one thread, tiny models of every family with randomised norms, their space."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.space import SpaceConfig

torch.set_num_threads(1)

VOCABULARY = 61
SPACE = SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, 1, 2, 4])
ATTENTION = ("sdpa", "eager")


def randomised(model):
    """Norms, biases and weights all random: unit norms and zero biases would hide a missed slice."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name or ".ln_" in name
            parameter.copy_(1 + 0.3 * noise if norm and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def make_llama(attn_implementation="sdpa", **differences):
    """A tiny grouped-query Llama with tied embeddings and no biases, but for the differences."""
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
    return randomised(LlamaForCausalLM(LlamaConfig(**(settings | differences))))


def make_gpt2(attn_implementation="sdpa", **differences):
    """A tiny GPT-2 without dropout, but for the differences."""
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_inner": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": attn_implementation,
    }
    return randomised(GPT2LMHeadModel(GPT2Config(**(settings | differences))))


# the family matrix: every equality of the elastic core is tested on each of these
MODELS = {
    "llama-gqa": make_llama,
    "llama-mha": lambda attention="sdpa": make_llama(attention, num_key_value_heads=8),
    "llama-untied": lambda attention="sdpa": make_llama(attention, tie_word_embeddings=False),
    "llama-biased": lambda attention="sdpa": make_llama(attention, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda attention="sdpa": make_llama(attention, head_dim=8),
    "gpt2": make_gpt2,
    "gpt2-untied": lambda attention="sdpa": make_gpt2(attention, tie_word_embeddings=False),
    "gpt2-scaled": lambda attention="sdpa": make_gpt2(
        attention, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True
    ),
}


def space_for(model):
    """Quarter, half and full widths of both kinds, and skips."""
    config = model.config
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, groups // 4, groups // 2, groups])


@pytest.fixture(params=MODELS, scope="module")
def model(request):
    """A dense model of every family in turn; tests that change it copy it."""
    return MODELS[request.param]()


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
    """The model, and an elastic copy of it."""
    elastic = copy.deepcopy(model)
    return model, ElasticBackbone(elastic, space_for(elastic))
