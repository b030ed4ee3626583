"""Counted costs against what extraction gives and what torch counts, for every family."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from flextron_lit.costs import COUNTED, Workload, parameter_table
from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.costs.counted import flops_table, kv_bytes_table, memory_table
from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.extraction import kept_layers
from flextron_lit.space import SpaceConfig, SubNetwork
from tests.conftest import make_llama, space_for

WORKLOAD = Workload(batch_size=2, prompt_tokens=17, generated_tokens=6)
COUNT = 50


@pytest.fixture
def backbone(model):
    # torch's counter sees nothing of sdpa on a CPU
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return ElasticBackbone(eager, space_for(eager))


def stratified(backbone, generator):
    """Random sub-networks spread evenly over the parameters of the blocks, with skips."""
    space, table = backbone.space, parameter_table(backbone)
    smallest = table.ratio(space.smallest())
    costs = [smallest + (1 - smallest) * (i + 0.5) / COUNT for i in range(COUNT)]
    drawn = [sampling.at_cost(space, table, cost, generator, tolerance=0.05) for cost in costs]
    assert sum(0 in space.widths(s) for s in drawn) > COUNT // 5
    return drawn


def counted_by_torch(run):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    per_module = counter.get_flop_counts()
    rotary = sum(sum(counts.values()) for name, counts in per_module.items() if name.endswith("rotary_emb"))
    return counter.get_total_flops() - rotary


def cache_of(model, tokens):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.ones(WORKLOAD.batch_size, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache


def test_parameters_are_those_of_the_extracted_model(backbone, generator):
    table = parameter_table(backbone)
    assert table.full == sum(p.numel() for p in backbone.model.parameters())
    fewer = set()
    for sub_network in stratified(backbone, generator):
        extracted = extract(backbone, sub_network)
        # the elastic network has norms beside blocks, of every layer
        gone = set(range(len(backbone.layers))) - set(kept_layers(backbone, backbone.space.widths(sub_network)))
        beside = (m for i in gone for name, m in backbone.layers[i].named_children() if "norm" in name or "ln_" in name)
        norms = sum(p.numel() for norm in beside for p in norm.parameters())
        assert table.cost(sub_network) == norms + sum(p.numel() for p in extracted.parameters())
        fewer.add(norms)
    # where their place counts all layers stay
    assert bool(max(fewer)) != getattr(backbone.model.config, "scale_attn_by_inverse_layer_idx", False)
    assert table.cost(backbone.space.smallest()) < table.cost(backbone.space.uniform(0.5, 0.5)) < table.full


def test_flops_are_those_that_torch_counts(backbone, generator):
    prefill, decode = COUNTED["prefill_flops"](backbone, WORKLOAD), COUNTED["decode_flops"](backbone, WORKLOAD)
    prompt = torch.ones(WORKLOAD.batch_size, WORKLOAD.prompt_tokens, dtype=torch.long)
    # the mean context is a whole number of tokens for an even number of generated ones
    before = int(WORKLOAD.decode_context) - 1
    seen = set()
    for sub_network in stratified(backbone, generator):
        model = extract(backbone, sub_network)
        cache = cache_of(model, before)
        found = counted_by_torch(lambda model=model: model(prompt, use_cache=False, logits_to_keep=1))
        assert prefill.cost(sub_network) == found
        step = counted_by_torch(lambda model=model, cache=cache: model(prompt[:, :1], past_key_values=cache))
        assert decode.cost(sub_network) == step
        seen.add((found, step))
    assert len(seen) > COUNT // 2


def test_kv_bytes_are_those_of_the_cache(backbone, generator):
    table = kv_bytes_table(backbone, WORKLOAD)
    seen = set()
    for sub_network in stratified(backbone, generator):
        with backbone.use(sub_network):
            cache = cache_of(backbone.model, WORKLOAD.total_tokens)
        layers = [layer for layer in cache.layers if layer.get_seq_length()]
        found = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        assert table.cost(sub_network) == found
        seen.add(found)
    assert len(seen) > 5


def test_a_request_is_a_prefill_and_its_decode_steps(backbone, generator):
    sub_network = backbone.space.random(generator)
    prefill, decode = COUNTED["prefill_flops"](backbone, WORKLOAD), COUNTED["decode_flops"](backbone, WORKLOAD)
    request = flops_table(backbone, WORKLOAD)
    assert request.cost(sub_network) == prefill.cost(sub_network) + 5 * decode.cost(sub_network)
    by_step = [
        COUNTED["decode_flops"](backbone, Workload(batch_size=2, prompt_tokens=context - 1, generated_tokens=2))
        for context in range(18, 23)
    ]
    assert sum(step.cost(sub_network) for step in by_step) == pytest.approx(5 * decode.cost(sub_network))


@pytest.mark.parametrize("name", COUNTED)
def test_every_counted_cost_is_linear_and_differentiable(backbone, name, generator):
    table = COUNTED[name](backbone, WORKLOAD)
    assert table.name == name
    table.check(backbone.space)
    sub_networks = [backbone.space.random(generator) for _ in range(5)]
    one_hot = torch.stack([backbone.space.one_hot(s) for s in sub_networks]).double().requires_grad_()
    costs = torch.tensor([table.cost(s) for s in sub_networks], dtype=torch.float64)
    torch.testing.assert_close(table.expected(one_hot), costs, rtol=1e-12, atol=0)
    table.expected(one_hot.mean(0)).backward()
    assert one_hot.grad[0][2][-1].item() == pytest.approx(table.blocks[2][-1] / 5)


@pytest.mark.parametrize("name", ["kv_bytes", "memory"])
def test_half_precision_takes_half_the_bytes(backbone, name):
    half = replace(WORKLOAD, dtype="bfloat16")
    assert COUNTED[name](backbone, half).full == COUNTED[name](backbone, WORKLOAD).full / 2


def test_memory_is_weights_and_cache(backbone, generator):
    sub_network = backbone.space.random(generator)
    extracted = extract(backbone, sub_network)
    weights = sum(p.nbytes for p in extracted.parameters())
    expected = weights + kv_bytes_table(backbone, WORKLOAD).cost(sub_network)
    assert memory_table(backbone, WORKLOAD).cost(sub_network) == expected


def test_tied_weights_count_once():
    space = SpaceConfig(mlp=[16, 64], attention=[2, 4])
    tied, untied = (parameter_table(ElasticBackbone(make_llama(tie_word_embeddings=t), space)) for t in (True, False))
    assert untied.fixed - tied.fixed == 61 * 32
    assert untied.blocks == tied.blocks


def test_a_skipped_block_costs_nothing(backbone):
    skipping = SubNetwork((0, 0, 0, 0, 0, 0))
    assert all(row[0] == 0 for row in parameter_table(backbone).blocks[1:])
    assert kv_bytes_table(backbone, WORKLOAD).cost(skipping) == kv_bytes_table(backbone, WORKLOAD).blocks[0][0]


@pytest.mark.parametrize("setting", ["batch_size", "prompt_tokens", "generated_tokens"])
def test_a_workload_of_nothing_is_refused(setting):
    with pytest.raises(ValueError, match="must be 1 or more"):
        Workload(**{setting: 0})
