import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PhiConfig, PhiForCausalLM, StaticCache

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.families.llama import ElasticLlamaMLP
from flextron_lit.space import SpaceConfig, SubNetwork
from tests.conftest import SPACE, make_llama


def test_a_static_cache_takes_each_layers_own_groups(tokens, backbone):
    cache = StaticCache(config=backbone.model.config, max_cache_len=32)
    with backbone.use(SubNetwork((0, 3, 2, 3, 3, 3))), torch.no_grad():
        backbone.model(tokens, past_key_values=cache, use_cache=True)
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 2, 4]


def test_activation_checkpointing_gives_the_same_gradients(tokens):
    plain, checkpointed = (ElasticBackbone(make_llama(), SPACE) for _ in range(2))
    checkpointed.enable_activation_checkpointing()
    sub_network = SubNetwork((1, 2, 2, 1, 0, 0))
    for backbone in (plain, checkpointed):
        backbone.model.train()
        with backbone.use(sub_network):
            backbone.model(tokens, labels=tokens, use_cache=False).loss.backward()
    gradients = [[p.grad for p in b.model.parameters() if p.grad is not None] for b in (plain, checkpointed)]
    assert len(gradients[0]) == len(gradients[1]) > 10
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_backward_recomputes_the_widths_of_the_forward_whatever_is_active_by_then(tokens):
    """Also where a pass of other widths comes in between."""
    gradients = []
    for checkpointing in (False, True):
        backbone = ElasticBackbone(make_llama(), SPACE)
        if checkpointing:
            backbone.enable_activation_checkpointing()
        backbone.model.train()
        with backbone.use(backbone.space.smallest()):
            loss = backbone.model(tokens, labels=tokens, use_cache=False).loss
        with backbone.use(SubNetwork((1, 2, 2, 1, 0, 0))):
            backbone.model(tokens, labels=tokens, use_cache=False)
            loss.backward()
            assert backbone.selection.current == SubNetwork((1, 2, 2, 1, 0, 0))
        gradients.append({n: p.grad for n, p in backbone.model.named_parameters() if p.grad is not None})
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_without_it_another_selection_in_backward_would_be_noticed(tokens, backbone):
    backbone.model.activation_checkpointing_enable({"use_reentrant": False})
    backbone.model.train()
    with backbone.use(backbone.space.smallest()):
        loss = backbone.model(tokens, labels=tokens, use_cache=False).loss
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_use_restores_and_nests(backbone):
    space, selection = backbone.space, backbone.selection
    with backbone.use(space.smallest()):
        with pytest.raises(KeyError), backbone.use(space.uniform(0.5)):
            raise KeyError
        assert selection.current == space.smallest()
    assert selection.current == space.full()


def test_use_from_a_second_thread_is_refused(backbone):
    raised = []

    def other():
        try:
            with backbone.use(backbone.space.full()):
                pass
        except RuntimeError as error:
            raised.append(str(error))

    with backbone.use(backbone.space.smallest()):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another thread" in raised[0]
    other()
    assert len(raised) == 1


def test_use_refuses_a_sub_network_of_another_model(backbone):
    with pytest.raises(ValueError, match="2 choices, the space 6 blocks"), backbone.use(SubNetwork((0, 0))):
        pass


def test_a_switch_copies_nothing(tokens, backbone):
    weights = {name: p.data_ptr() for name, p in backbone.model.named_parameters()}
    mlp = backbone.model.model.layers[0].mlp
    used = []
    original = F.linear
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr("flextron_lit.elastic.prefix.F.linear", lambda x, w, b: used.append(w) or original(x, w, b))
        with backbone.use(backbone.space.uniform(mlp=0.25)):
            backbone.model(tokens)
    shapes = {w.data_ptr(): tuple(w.shape) for w in used}
    assert shapes[mlp.gate_proj.weight.data_ptr()] == (16, 32)
    assert shapes[mlp.up_proj.weight.data_ptr()] == (16, 32)
    assert shapes[mlp.down_proj.weight.data_ptr()] == (32, 16)
    assert {name: p.data_ptr() for name, p in backbone.model.named_parameters()} == weights


def test_conversion_keeps_the_model_and_undo_is_exact(tokens, tmp_path):
    model = make_llama()
    classes = [type(m) for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [sorted(vars(m)) for m in model.modules()]
    backbone = ElasticBackbone(model, SPACE)
    assert isinstance(model.model.layers[0].mlp, ElasticLlamaMLP)
    assert list(model.state_dict()) == list(state)
    model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert [type(m) for m in reloaded.modules()] == classes
    assert backbone.undo() is model
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(model(tokens).logits, reloaded(tokens).logits)


def test_output_attentions_are_captured(tokens):
    model = ElasticBackbone(make_llama("eager"), SPACE).model
    assert len(model(tokens, output_attentions=True).attentions) == 3


def spoil_quantised(model):
    model.is_quantized = True


def spoil_forward(model):
    model.model.layers[1].mlp.forward = lambda x: x


def spoil_pass(model):
    model.model.forward = lambda *_, **__: None


def spoil_class(model):
    model.model.layers[2].self_attn.q_proj = nn.Sequential(model.model.layers[2].self_attn.q_proj)


def spoil_hook(model):
    model.model.layers[2].mlp.down_proj.register_forward_hook(lambda *_: None)


def spoil_parameter(model):
    model.model.layers[2].mlp.extra = nn.Parameter(torch.zeros(3))


def spoil_checkpointing(model):
    model.activation_checkpointing_enable({"use_reentrant": True})


def spoil_twice(model):
    ElasticBackbone(model, SPACE)


def spoil_shape(model):
    model.config.intermediate_size = 48


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_quantised, "quantised"),
        (spoil_forward, "forward of its own"),
        (spoil_pass, "model has a forward of its own"),
        (spoil_class, "q_proj of layers.2.attention is a Sequential, but must be a Linear"),
        (spoil_hook, "carries forward hooks"),
        (spoil_parameter, "extra of layers.2.mlp is not known"),
        (spoil_checkpointing, "activation checkpointing is already on"),
        (spoil_twice, "elastic already"),
    ],
)
def test_a_model_that_cannot_convert_is_refused_and_untouched(spoil, message):
    model = make_llama()
    spoil(model)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        ElasticBackbone(model, SPACE)
    assert [type(m) for m in model.modules()] == classes


def test_a_shape_that_units_do_not_divide_is_refused():
    model = make_llama()
    spoil_shape(model)
    with pytest.raises(ValueError, match="has 64 rows, which 48 units do not divide evenly"):
        ElasticBackbone(model, SpaceConfig())


def test_an_unknown_class_is_refused_with_the_list():
    config = PhiConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    message = (
        "PhiForCausalLM cannot become elastic: supported model classes are LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM, SmolLM3ForCausalLM, GemmaForCausalLM, GPTNeoXForCausalLM, GPT2LMHeadModel"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        ElasticBackbone(PhiForCausalLM(config))


def test_a_space_of_another_model_is_refused():
    space = ElasticBackbone(make_llama(num_hidden_layers=2), SPACE).space
    with pytest.raises(ValueError, match="made for another model"):
        ElasticBackbone(make_llama(), space)
