"""Sliding windows: layers that have one beside layers that do not, and what attention and costs are told of it."""

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache, Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flextron_lit.costs import COUNTED, Workload, dynamic_table
from flextron_lit.costs.counted import kv_bytes_table
from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.space import SpaceConfig, SubNetwork
from tests.conftest import MODELS, elastic_pair, make_rotary, space_for
from tests.elastic.test_families import TOLERANCE, WRONG
from tests.elastic.test_grouping import Linear

WINDOW = 8
MIXED = {"use_sliding_window": True, "sliding_window": WINDOW, "num_hidden_layers": 4, "attn_implementation": "eager"}
TYPES = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
MAKE = {
    "qwen2-mixed": partial(make_rotary, Qwen2ForCausalLM, layer_types=TYPES, **MIXED),
    "qwen3-mixed": partial(make_rotary, Qwen3ForCausalLM, layer_types=TYPES, head_dim=4, **MIXED),
    # the layers without positions have the window
    "smollm3-mixed": partial(make_rotary, SmolLM3ForCausalLM, no_rope_layers=[1, 0, 1, 0], **MIXED),
}


@pytest.fixture(params=MAKE, scope="module")
def mixed(request):
    return MAKE[request.param]()


@pytest.fixture
def backbone(mixed):
    return elastic_pair(mixed)[1]


def skipping(space):
    """Half of everything, but attention that is skipped wherever it may be."""
    return SubNetwork(tuple(0 if b.kind == "attention" else 2 for b in space.blocks))


def test_the_first_layer_of_each_type_is_never_skipped(mixed):
    assert mixed.config.layer_types == TYPES
    backbone = elastic_pair(mixed)[1]
    skippable = [b.layer for b in backbone.space.blocks if b.kind == "attention" and b.widths[0] == 0]
    assert skippable == [2, 3]
    assert [e.window for e in backbone.blocks if e.block.kind == "attention"] == [None, WINDOW, None, WINDOW]


def test_a_space_that_may_skip_it_is_refused(mixed):
    without = elastic_pair(MODELS["qwen2"](num_hidden_layers=4))[1].space
    assert without.blocks[2].widths[0] == 0
    with pytest.raises(ValueError, match="layers.1.attention cannot have width 0: the KV cache reads its length there"):
        ElasticBackbone(mixed, without)


@torch.no_grad()
def test_cached_equals_uncached_past_the_window(backbone, tokens, monkeypatch):
    sub_network = skipping(backbone.space)

    def steps(model):
        cache = DynamicCache(config=model.config)
        return torch.cat(
            [model(part, past_key_values=cache).logits for part in tokens.split([11, 3, 1, 1, 1, 1, 1], 1)], 1
        )

    with backbone.use(sub_network):
        expected = backbone.model(tokens, use_cache=False).logits
        torch.testing.assert_close(steps(backbone.model), expected, **TOLERANCE)
    torch.testing.assert_close(steps(extract(backbone, sub_network)), expected, **TOLERANCE)
    with backbone.use(Linear(backbone.space)):
        expected = backbone.model(tokens, use_cache=False).logits
        torch.testing.assert_close(steps(backbone.model), expected, **TOLERANCE)
    # why the first layer of each type is never skipped (of those with a window: static caches)
    dense = backbone.undo()
    monkeypatch.setattr("flextron_lit.elastic.backbone.cache_layers", lambda config: set())
    unsafe = ElasticBackbone(dense, space_for(dense))
    with unsafe.use(unsafe.space.full().replace(0, 0)):
        expected = unsafe.model(tokens, use_cache=False).logits
        try:
            wrong = (steps(unsafe.model) - expected).abs().max()
        except RuntimeError:
            # masks and keys that do not even fit together
            return
    assert wrong > WRONG


@pytest.mark.parametrize("name", [*MAKE, "mistral-window", "mistral", "llama-gqa", "gpt-neox", "gpt2"])
@torch.no_grad()
def test_attention_is_told_at_every_width_what_the_stock_forward_tells_it(name, tokens, monkeypatch):
    model = (MAKE | MODELS)[name]()
    told = []

    def spy(module, query, key, value, mask, **options):
        told.append({k: v for k, v in options.items() if v is not None and not isinstance(v, torch.Tensor)})
        return query.transpose(1, 2), None

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: spy)
    model(tokens, use_cache=False)
    expected = told.copy()
    assert any("sliding_window" in options for options in expected) == (name in MAKE or name == "mistral-window")
    backbone = ElasticBackbone(model, space_for(model))
    for selection in (backbone.space.full(), backbone.space.uniform(0.5, 0.5), Linear(backbone.space)):
        told.clear()
        with backbone.use(selection):
            backbone.model(tokens, use_cache=False)
        assert told == expected


def test_a_long_request_costs_no_more_than_its_window(backbone):
    space, short, long = backbone.space, *(Workload(prompt_tokens=n, generated_tokens=5) for n in (3, 40))
    kv = kv_bytes_table(backbone, long)
    sliding, full = kv.blocks[2][-1], kv.blocks[0][-1]
    assert sliding * long.total_tokens == full * (WINDOW - 1)
    assert kv_bytes_table(backbone, short).blocks[2] == kv_bytes_table(backbone, short).blocks[0]
    # four steps that attend to 41 to 44 tokens, or to 8
    per_token = 2 * 2 * backbone.model.config.num_attention_heads * backbone.blocks[0].head_dim
    decode = COUNTED["decode_flops"](backbone, long)
    assert decode.blocks[0][-1] - decode.blocks[2][-1] == pytest.approx(per_token * (42.5 - WINDOW))
    assert COUNTED["decode_flops"](backbone, short).blocks[0] != decode.blocks[0]
    assert dynamic_table(backbone, "decode_flops", long).full == decode.full
    # a window that fills up on the way: 4, 5, 6, 7, 8, 8 and 8 tokens
    filling = COUNTED["decode_flops"](backbone, Workload(prompt_tokens=3, generated_tokens=8))
    assert filling.blocks[0][-1] - filling.blocks[2][-1] == pytest.approx(per_token * (49 - 46) / 7)
    assert space.full().choices[2] == len(decode.blocks[2]) - 1


def test_extracted_uniformly_it_keeps_its_windows(mixed, tokens, tmp_path):
    backbone = ElasticBackbone(copy.deepcopy(mixed), SpaceConfig(mlp=[32, 64], attention=[3, 4]))
    extracted = extract(backbone, backbone.space.uniform(0.5, 0.75))
    extracted.save_pretrained(tmp_path)
    reloaded = type(mixed).from_pretrained(tmp_path, attn_implementation="eager")
    assert [layer.self_attn.sliding_window for layer in reloaded.model.layers] == [None, WINDOW, None, WINDOW]
    with torch.no_grad():
        assert torch.equal(reloaded(tokens).logits, extracted(tokens).logits)
        reloaded.config.sliding_window = 4 * WINDOW
        assert not torch.equal(reloaded(tokens).logits, extracted(tokens).logits)
