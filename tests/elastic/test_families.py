"""The family matrix: every equality of the elastic core, on every family and variant, with a negative control each."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPTNeoXForCausalLM

from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.importance import falling_order, measure, permute
from flextron_lit.space import SubNetwork
from tests.conftest import ATTENTION, elastic_pair, space_for

# two orders of summation of the same numbers in fp32
TOLERANCE = {"rtol": 1e-5, "atol": 3e-5}
# a control must be wrong by far more than that
WRONG = 1e-3

# where a layer keeps the projections that read a block's units
OUTPUTS = {
    GPT2LMHeadModel: {"attention": "transformer.h.{}.attn.c_proj", "mlp": "transformer.h.{}.mlp.c_proj"},
    GPTNeoXForCausalLM: {
        "attention": "gpt_neox.layers.{}.attention.dense",
        "mlp": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    },
}
LIKE_LLAMA = {"attention": "model.layers.{}.self_attn.o_proj", "mlp": "model.layers.{}.mlp.down_proj"}


def output_of(model, block):
    return model.get_submodule(OUTPUTS.get(type(model), LIKE_LLAMA)[block.kind].format(block.layer))


def inputs_of(projection):
    return projection.nx if hasattr(projection, "nx") else projection.in_features


def masked(model, space, sub_network):
    """Reference: a copy of the dense model with the units outside the sub-network switched off by zeros."""
    model = copy.deepcopy(model)
    for block, width in zip(space.blocks, space.widths(sub_network), strict=True):
        output = output_of(model, block)
        keep = inputs_of(output) // block.full * width

        def mask(module, inputs, keep=keep):
            hidden = inputs[0]
            return (torch.where(torch.arange(hidden.shape[-1]) < keep, hidden, 0.0),)

        output.register_forward_pre_hook(mask)
        if width == 0:
            output.register_forward_hook(lambda module, inputs, result: result * 0)
    return model


def some_sub_networks(space, generator, count=8):
    return [space.full(), space.smallest(), space.uniform(0.5, 0.5), *(space.random(generator) for _ in range(count))]


def with_attention(model, attention):
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    return model


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_full_width_is_the_dense_model_exactly(model, attention, tokens):
    dense, backbone = elastic_pair(with_attention(model, attention))
    expected = dense(tokens).logits
    assert torch.equal(backbone.model(tokens).logits, expected)
    with backbone.use(backbone.space.uniform(mlp=0.5)):
        assert not torch.equal(backbone.model(tokens).logits, expected)
    assert torch.equal(backbone.model(tokens).logits, expected)


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_sliced_equals_masked_equals_extracted(model, attention, tokens, generator):
    dense, backbone = elastic_pair(with_attention(model, attention))
    space = backbone.space
    for sub_network in some_sub_networks(space, generator):
        with backbone.use(sub_network):
            sliced = backbone.model(tokens).logits
        torch.testing.assert_close(sliced, masked(dense, space, sub_network)(tokens).logits, **TOLERANCE)
        torch.testing.assert_close(sliced, extract(backbone, sub_network)(tokens).logits, **TOLERANCE)
        other = sub_network.replace(1, (sub_network.choices[1] + 1) % 4)
        assert (sliced - masked(dense, space, other)(tokens).logits).abs().max() > WRONG
        assert (sliced - extract(backbone, other)(tokens).logits).abs().max() > WRONG


def test_gradients_equal_those_of_the_masked_model(model, tokens):
    dense, backbone = elastic_pair(model)
    sub_network = SubNetwork((1, 2, 2, 1, 0, 3))
    with backbone.use(sub_network):
        backbone.model(tokens, labels=tokens, use_cache=False).loss.backward()
    reference = masked(dense, backbone.space, sub_network)
    reference(tokens, labels=tokens, use_cache=False).loss.backward()
    expected = {n: p.grad for n, p in reference.named_parameters()}
    for name, parameter in backbone.model.named_parameters():
        # a skipped block has no gradient at all
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, expected[name], **TOLERANCE)
    output = output_of(backbone.model, backbone.space.blocks[1])
    assert output.weight.grad.abs().max() > WRONG


@torch.no_grad()
def test_sorting_keeps_the_function_and_can_be_undone_bit_for_bit(model, tokens):
    dense, backbone = elastic_pair(model)
    order = falling_order(measure(backbone, [{"input_ids": tokens}]))
    permute(backbone, order)
    expected = dense(tokens).logits
    torch.testing.assert_close(backbone.model(tokens).logits, expected, **TOLERANCE)
    before = dict(dense.named_parameters())
    assert any(not torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    assert all(s.tolist() == sorted(s, reverse=True) for s in measure(backbone, [{"input_ids": tokens}]))
    permute(backbone, [units.argsort() for units in order])
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    # one tensor alone out of step with the others changes the function
    for elastic in backbone.blocks[:2]:
        for axis, tensor in elastic.tensors:
            kept = tensor.clone()
            tensor.copy_(axis.permuted(tensor, torch.arange(elastic.block.full).flip(0)))
            assert (backbone.model(tokens).logits - expected).abs().max() > WRONG, axis.tensor
            tensor.copy_(kept)


@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_generation_equals_uncached_and_extracted(model, attention, tokens, generator):
    backbone = ElasticBackbone(with_attention(model, attention), space_for(model))
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    produced = set()
    for sub_network in some_sub_networks(backbone.space, generator, 3):
        with backbone.use(sub_network):
            cached = backbone.model.generate(tokens, use_cache=True, **settings)
            assert torch.equal(cached, backbone.model.generate(tokens, use_cache=False, **settings))
            assert torch.equal(cached, backbone.model.generate(tokens, cache_implementation="static", **settings))
        assert torch.equal(cached, extract(backbone, sub_network).generate(tokens, **settings))
        produced.add(tuple(cached.flatten().tolist()))
    assert len(produced) > 2


def test_left_padding_changes_nothing_even_where_blocks_are_skipped(model, tokens):
    backbone = ElasticBackbone(copy.deepcopy(model), space_for(model))
    # so short that a sliding window, too, reaches into the padding
    tokens = tokens[:, :4]
    padded = F.pad(tokens, (5, 0), value=0)
    settings = {"max_new_tokens": 8, "do_sample": False}
    with backbone.use(SubNetwork((1, 0, 0, 1, 0, 0))):
        plain = backbone.model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        shifted = backbone.model.generate(padded, attention_mask=(padded != 0).long(), **settings)
        with torch.no_grad():
            expected, unmasked = (backbone.model(ids).logits[:, -1] for ids in (tokens, padded))
    assert torch.equal(plain[:, tokens.shape[1] :], shifted[:, padded.shape[1] :])
    assert (expected - unmasked).abs().max() > WRONG


@torch.no_grad()
def test_packed_documents_do_not_see_each_other(model, tokens):
    backbone = ElasticBackbone(copy.deepcopy(model), space_for(model))
    joined = tokens.flatten()[None]
    positions = torch.arange(tokens.shape[1]).repeat(2)[None]
    for sub_network in (backbone.space.full(), SubNetwork((1, 2, 0, 0, 2, 1))):
        with backbone.use(sub_network):
            separate = backbone.model(tokens, use_cache=False).logits.flatten(0, 1)
            packed = backbone.model(joined, position_ids=positions, use_cache=False).logits[0]
            one = backbone.model(joined, use_cache=False).logits[0]
        torch.testing.assert_close(packed, separate, **TOLERANCE)
        assert (one - separate).abs().max() > WRONG


def test_activation_checkpointing_gives_the_same_gradients(model, tokens):
    plain, checkpointed = (ElasticBackbone(copy.deepcopy(model), space_for(model)) for _ in range(2))
    checkpointed.enable_activation_checkpointing()
    gradients = []
    for backbone, sub_network in ((plain, 1), (checkpointed, 1), (plain, 2)):
        backbone.model.train().zero_grad()
        with backbone.use(SubNetwork((sub_network, 2, 2, 1, 0, 0))):
            backbone.model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in backbone.model.named_parameters() if p.grad is not None})
    one, same, other = gradients
    assert one.keys() == same.keys()
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


@torch.no_grad()
def test_saving_gives_a_stock_checkpoint_and_undo_is_exact(model, tokens, tmp_path):
    dense, backbone = elastic_pair(model)
    classes = [type(m) for m in dense.modules()]
    assert [type(m) for m in backbone.model.modules()] != classes
    assert list(backbone.model.state_dict()) == list(dense.state_dict())
    backbone.model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [type(m) for m in reloaded.modules()] == classes
    assert torch.equal(reloaded(tokens).logits, dense(tokens).logits)
    restored = backbone.undo()
    assert [type(m) for m in restored.modules()] == classes
    assert [sorted(vars(m)) for m in restored.modules()] == [sorted(vars(m)) for m in dense.modules()]
    assert torch.equal(restored(tokens).logits, dense(tokens).logits)
