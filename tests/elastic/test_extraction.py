import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from flextron_lit.costs import parameter_table
from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.space import SpaceConfig, SubNetwork
from tests.conftest import MODELS, SPACE, elastic_pair, make_gpt2, make_gpt_neox, make_llama, space_for


def test_an_extracted_model_holds_nothing_but_its_own_weights(model):
    backbone = ElasticBackbone(copy.deepcopy(model), space_for(model))
    sub_network = SubNetwork((1, 2, 0, 1, 3, 0))
    extracted = extract(backbone, sub_network)
    assert sum(p.numel() for p in extracted.parameters()) == parameter_table(backbone).cost(sub_network)
    theirs = {p.untyped_storage().data_ptr() for p in backbone.model.parameters()}
    assert not theirs & {p.untyped_storage().data_ptr() for p in extracted.parameters()}
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in extracted.parameters())
    assert not any("lastic" in type(m).__name__ or hasattr(m, "elastic") for m in extracted.modules())
    assert sum("Skipped" in type(m).__name__ for m in extracted.modules()) == 2


def test_extraction_leaves_the_elastic_network_as_it_was(model, tokens):
    dense, backbone = elastic_pair(model)
    classes = [type(m) for m in backbone.model.modules()]
    extract(backbone, backbone.space.smallest())
    assert [type(m) for m in backbone.model.modules()] == classes
    assert torch.equal(backbone.model(tokens).logits, dense(tokens).logits)
    assert backbone.model.config.to_dict() == dense.config.to_dict()


def test_tied_weights_stay_tied():
    for tied in (True, False):
        backbone = ElasticBackbone(make_llama(tie_word_embeddings=tied))
        extracted = extract(backbone, backbone.space.smallest())
        head, embedding = extracted.get_output_embeddings(), extracted.get_input_embeddings()
        assert (head.weight is embedding.weight) == tied


@pytest.mark.parametrize(
    ("dense", "space", "mlp", "attention"),
    [
        (make_llama(), SpaceConfig(mlp=[32, 64], attention=[2, 4]), 0.5, 0.5),
        (make_llama(head_dim=8), SpaceConfig(mlp=[32, 64], attention=[1, 4]), 0.5, 0.25),
        # 3 groups of 2 heads do not divide the hidden size, which only LlamaConfig demands
        (MODELS["mistral-window"](), SpaceConfig(mlp=[32, 64], attention=[3, 4]), 0.5, 0.75),
        (MODELS["qwen2"](), SpaceConfig(mlp=[32, 64], attention=[3, 4]), 0.5, 0.75),
        (MODELS["qwen3-wide-heads"](), SpaceConfig(mlp=[32, 64], attention=[3, 4]), 0.5, 0.75),
        (MODELS["smollm3"](), SpaceConfig(mlp=[32, 64], attention=[3, 4]), 0.5, 0.75),
        (MODELS["gemma"](), SpaceConfig(mlp=[32, 64], attention=[3, 4]), 0.5, 0.75),
        (make_gpt_neox(), SpaceConfig(mlp=[32, 64], attention=[2, 4]), 0.5, 1.0),
        (make_gpt2(), SpaceConfig(mlp=[32, 64], attention=[2, 4]), 0.5, 1.0),
    ],
    ids=["llama", "llama-wide-heads", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gpt-neox", "gpt2"],
)
def test_a_uniform_one_saves_as_a_stock_checkpoint(dense, space, mlp, attention, tokens, tmp_path):
    backbone = ElasticBackbone(dense, space)
    extracted = extract(backbone, backbone.space.uniform(mlp, attention))
    extracted.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(dense)
    assert sum(p.numel() for p in reloaded.parameters()) == sum(p.numel() for p in extracted.parameters())
    with torch.no_grad(), backbone.use(backbone.space.uniform(mlp, attention)):
        torch.testing.assert_close(reloaded(tokens).logits, backbone.model(tokens).logits, rtol=1e-5, atol=2e-5)
    assert (reloaded(tokens).logits - backbone.model(tokens).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("dense", "space", "sub_network"),
    [
        (make_llama(), SPACE, SubNetwork((2, 2, 3, 2, 3, 3))),
        (make_llama(), SPACE, SubNetwork((2, 0, 3, 0, 3, 0))),
        # 3 groups of 2 heads do not divide the hidden size, which LlamaConfig demands
        (make_llama(), SpaceConfig(attention=[3, 4]), SubNetwork((0, 3, 0, 3, 0, 3))),
        # GPT-NeoX and GPT-2 derive the size of a head from their number
        (make_gpt_neox(), SPACE, SubNetwork((1, 3, 2, 3, 2, 3))),
        (make_gpt2(), SPACE, SubNetwork((1, 3, 2, 3, 2, 3))),
    ],
    ids=["layers-differ", "skips", "heads-do-not-divide", "gpt-neox-fewer-heads", "gpt2-fewer-heads"],
)
def test_what_no_stock_class_holds_refuses_to_be_saved(dense, space, sub_network, tmp_path):
    extracted = extract(ElasticBackbone(dense, space), sub_network)
    with pytest.raises(ValueError, match="no stock class holds these widths"):
        extracted.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen3-wide-heads", "smollm3", "gpt2", "gpt-neox"])
def test_layers_that_are_skipped_as_a_whole_are_gone(name, tokens):
    backbone = ElasticBackbone(MODELS[name]().eval(), SpaceConfig(mlp=[0, 32, 64], attention=[0, 2, 4]))
    space = backbone.space
    # in SmolLM3 the one that differs from the others
    sub_network = space.uniform(0.5).replace(2, 0).replace(3, 0)
    small = extract(backbone, sub_network)
    assert small.config.num_hidden_layers == 2
    assert backbone.model.config.num_hidden_layers == 3
    with backbone.use(sub_network):
        expected = backbone.model(tokens).logits
    torch.testing.assert_close(small(tokens).logits, expected, rtol=1e-5, atol=2e-5)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(small.generate(tokens, **settings), small.generate(tokens, use_cache=False, **settings))
    with backbone.use(space.uniform(0.5)):
        assert (backbone.model(tokens).logits - expected).abs().max() > 1e-3


@torch.no_grad()
def test_layers_whose_place_counts_stay(tokens):
    backbone = ElasticBackbone(
        make_gpt2(scale_attn_by_inverse_layer_idx=True).eval(), SpaceConfig(mlp=[0, 64], attention=[0, 4])
    )
    sub_network = backbone.space.full().replace(2, 0).replace(3, 0)
    small = extract(backbone, sub_network)
    assert small.config.num_hidden_layers == 3
    with backbone.use(sub_network):
        torch.testing.assert_close(small(tokens).logits, backbone.model(tokens).logits, rtol=1e-5, atol=2e-5)


def test_a_sub_network_of_another_model_is_refused(backbone):
    with pytest.raises(ValueError, match="2 choices, the space 6 blocks"):
        extract(backbone, SubNetwork((0, 0)))
