"""What several tests share: one thread, tiny models of every family with randomised norms, their space."""

import copy
import os
import shutil
from functools import partial

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

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.compensation import shapes
from flextron_lit.elastic.compiled import widths
from flextron_lit.elastic.reconstruction import compensate
from flextron_lit.space import SpaceConfig
from tests import options
from tests.options import seed

VOCABULARY = 61
SPACE = SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, 1, 2, 4])
ATTENTION = ("sdpa", "eager")
GRAPHS = {}
"""Of all tests that take compiled passes apart, as a machine keeps its code."""
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
"""Options with which Chromium asks for nothing by itself."""


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="other random weights and tokens: added to every seed")
    parser.addoption("--threads", type=int, default=1, help="of torch, in tests and in what they start")


def pytest_configure(config):
    # the environment goes along to workers and to all that tests start
    os.environ[options.SEED] = str(config.getoption("--seed"))
    os.environ[options.THREADS] = str(config.getoption("--threads"))
    torch.set_num_threads(options.threads())


def randomised(model):
    """Norms, biases and weights all random: unit norms and zero biases would hide a missed slice."""
    generator = torch.Generator().manual_seed(seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name or ".ln_" in name
            # around what a norm starts with: 1, or 0 where the class adds the 1
            parameter.copy_(parameter + 0.3 * noise if norm and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def make(model_class, attn_implementation="sdpa", **settings):
    """A tiny model of 3 layers, 32 features and 64 neurons."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": attn_implementation,
    }
    return randomised(model_class(model_class.config_class(**(shared | settings))))


def make_rotary(model_class, attn_implementation="sdpa", **differences):
    """Of a family with Llama's names: grouped queries, tied embeddings, but for the differences."""
    settings = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}
    return make(model_class, attn_implementation, **(settings | differences))


def make_llama(attn_implementation="sdpa", **differences):
    """A tiny grouped-query Llama with tied embeddings and no biases, but for the differences."""
    return make_rotary(LlamaForCausalLM, attn_implementation, **differences)


def make_gpt_neox(attn_implementation="sdpa", **differences):
    """A tiny GPT-NeoX with a parallel residual and half of each head rotated, but for the differences."""
    settings = {"num_attention_heads": 4, "rotary_pct": 0.5}
    return make(GPTNeoXForCausalLM, attn_implementation, **(settings | differences))


def make_gpt2(attn_implementation="sdpa", **differences):
    """A tiny GPT-2 without dropout, but for the differences."""
    settings = {"num_attention_heads": 4, "n_inner": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return make(GPT2LMHeadModel, attn_implementation, **(settings | differences))


# the family matrix: every equality of the elastic core is tested on each of these, with -m matrix if not always
MODELS = {
    "llama-gqa": make_llama,
    "llama-mha": partial(make_llama, num_key_value_heads=8),
    "llama-untied": partial(make_llama, tie_word_embeddings=False),
    "llama-biased": partial(make_llama, attention_bias=True, mlp_bias=True),
    "llama-wide-heads": partial(make_llama, head_dim=8),
    "mistral": partial(make_rotary, MistralForCausalLM, sliding_window=None),
    # shorter than what tests put in
    "mistral-window": partial(make_rotary, MistralForCausalLM, sliding_window=8, tie_word_embeddings=False),
    "qwen2": partial(make_rotary, Qwen2ForCausalLM),
    "qwen2-untied": partial(make_rotary, Qwen2ForCausalLM, tie_word_embeddings=False),
    "qwen3-wide-heads": partial(make_rotary, Qwen3ForCausalLM, head_dim=8),
    "smollm3": partial(make_rotary, SmolLM3ForCausalLM, no_rope_layers=[1, 0, 1]),
    "gemma": partial(make_rotary, GemmaForCausalLM, head_dim=8),
    "gpt-neox": make_gpt_neox,
    "gpt-neox-serial": partial(make_gpt_neox, use_parallel_residual=False, attention_bias=False, rotary_pct=1.0),
    "gpt2": make_gpt2,
    "gpt2-untied": partial(make_gpt2, tie_word_embeddings=False),
    "gpt2-scaled": partial(make_gpt2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
}
REPRESENTATIVES = {
    "llama-gqa",  # grouped queries, tied embeddings, no biases
    "llama-biased",  # biases in every projection
    "mistral-window",  # a sliding window, untied embeddings
    "qwen3-wide-heads",  # norms of queries and keys, heads wider than the hidden size
    "smollm3",  # layers without positions
    "gemma",  # embeddings and norms of its own
    "gpt-neox",  # one fused projection, heads turned in part, a parallel residual
    "gpt2",  # transposed matrices, learned positions
}
"""One for each way through the code of the families: these are tested always."""


def with_compensation(backbone, form="own"):
    """The same, its narrower widths with something of their own, so large that leaving it out shows."""
    generator = torch.Generator().manual_seed(seed(2))

    def drawn(elastic):
        named = shapes(elastic.block.widths, elastic.rows, elastic.outgoing.shape[1], form)
        noise = {name: torch.randn(shape, generator=generator) for name, shape in named.items()}
        return {name: 0.2 * each if "projections" in name else 1 + each for name, each in noise.items()}

    compensate(backbone, [drawn(elastic) for elastic in backbone.blocks])
    return backbone


def space_for(model):
    """Quarter, half and full widths of both kinds, and skips."""
    config = model.config
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, groups // 4, groups // 2, groups])


def by_family(name):
    """As a parameter of tests: what goes the way of a representative is part of the whole matrix alone."""
    return pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.matrix)


@pytest.fixture(params=map(by_family, MODELS), scope="module")
def model(request):
    """A dense model of every family in turn; tests that change it copy it."""
    return MODELS[request.param]()


@pytest.fixture
def backbone():
    return ElasticBackbone(make_llama(), SPACE)


@pytest.fixture
def tokens():
    return torch.randint(1, VOCABULARY, (2, 19), generator=torch.Generator().manual_seed(seed(2)))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(seed(3))


def elastic_pair(model):
    """The model, and an elastic copy of it."""
    elastic = copy.deepcopy(model)
    return model, ElasticBackbone(elastic, space_for(elastic))


@pytest.fixture
def nothing_kept(monkeypatch):
    """What `as_traced` keeps, for graphs that are wrong on purpose: nothing of other tests, and nothing for them."""
    kept = {}
    monkeypatch.setitem(globals(), "GRAPHS", kept)
    return kept


@pytest.fixture
def as_traced(monkeypatch):
    """In place of a compiler, which takes seconds for a graph: the graph itself."""

    def code(what, device, trace):
        if str(what) not in GRAPHS:
            program, names = trace()
            GRAPHS[str(what)] = program.module(), names
        module, names = GRAPHS[str(what)]
        return lambda tensors: [module(tensors)], names, True

    monkeypatch.setattr(widths, "aot_inductor", code)


@pytest.fixture
def browser():
    """Headless Chromium; the driver is not among what tests need."""
    driver = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        yield opened
        opened.close()
