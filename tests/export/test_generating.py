"""Hugging Face's ways to generate, of an elastic network, of what is cut out of it, and of the classes of ours."""

from functools import partial

import pytest
import torch
from transformers import Qwen2ForCausalLM

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.export.classes import in_own_class
from flextron_lit.export.small_model import cut_out
from flextron_lit.space import SubNetwork
from tests.conftest import MODELS, VOCABULARY, make_rotary, space_for
from tests.options import seed

GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WAYS = {
    "static, in chunks": {"cache_implementation": "static", "prefill_chunk_size": 8},
    "in chunks": {"prefill_chunk_size": 8},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "without a cache": {"use_cache": False},
}
MAKE = MODELS | {
    # the first layer that may be skipped with a window is the last
    "qwen2-mixed": partial(
        make_rotary,
        Qwen2ForCausalLM,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        use_sliding_window=True,
        sliding_window=8,
    )
}


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-mixed", "llama-gqa", "gpt2", "gpt-neox"])
@torch.no_grad()
def test_every_way_to_generate_gives_one_text(family):
    backbone = ElasticBackbone(MAKE[family](), space_for(MAKE[family]()))
    choices = ((0 if b.widths[0] == 0 and b.layer >= 2 else 2) for b in backbone.space.blocks)
    sub_network = SubNetwork(tuple(choices))
    ids = torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(seed(2))).repeat(1, 2)
    small = cut_out(backbone, sub_network)
    made = in_own_class(small)
    # as it is read from disk, with buffers that no file holds
    own = type(made)(made.config).eval()
    own.load_state_dict(small.model.state_dict())
    with backbone.use(sub_network):
        expected = backbone.model.generate(ids, **GREEDY)
        for name, way in WAYS.items():
            for model in (backbone.model, small.model, own):
                assert torch.equal(model.generate(ids, **GREEDY, **way), expected), (name, type(model))
