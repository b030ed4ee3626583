"""LoRA on elastic projections: sliced with them at every width; whatever else sits on one is refused."""

import copy
from contextlib import ExitStack

import bitsandbytes
import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from flextron_lit.costs import COUNTED, Workload
from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.axis import Axis
from flextron_lit.elastic.unit_gates import gated
from flextron_lit.space import SubNetwork
from tests.conftest import MODELS, make_llama, space_for, with_compensation
from tests.elastic.test_grouping import Fixed, mixture
from tests.options import seed

PROJECTIONS = {
    "llama-gqa": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama-biased": ["q_proj", "o_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt-neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
WIDTHS = [(2, 3, 3, 3, 3, 3), (1, 2, 3, 1, 2, 2), (2, 1, 1, 3, 2, 1), (1, 3, 0, 2, 3, 0)]
TOLERANCE = 1e-5


def lora(name, **settings):
    return LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=PROJECTIONS[name],
        fan_in_fan_out=name == "gpt2",
        init_lora_weights=False,
        **settings,
    )


def elastic(name, form):
    model = MODELS[name]()
    backbone = ElasticBackbone(model, space_for(model))
    return backbone if form == "none" else with_compensation(backbone, form)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def differ(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def sliced(backbone, sub_network, state):
    """The weights of an adapter of the elastic network, as one for what is extracted."""
    state = dict(state)
    widths = backbone.space.widths(sub_network)
    for each, width in zip(backbone.blocks, widths, strict=True):
        becomes, units = each.elastic_class, each.block.full
        prefix = next(name for name, module in backbone.model.named_modules() if module is each.module)
        for name in (*becomes.inner, becomes.outer):
            key, axis = ("lora_B", Axis("", 0, becomes.parts)) if name != becomes.outer else ("lora_A", Axis("", 1))
            full = f"base_model.model.{prefix}.{name}.{key}.weight"
            if full not in state:
                continue
            if width:
                state[full] = axis.prefix(state[full], width, units).contiguous()
            else:
                del state[full], state[full.replace(key, "lora_A" if key == "lora_B" else "lora_B")]
    return state


def trained(backbone, name, tokens, **settings):
    """With an adapter, trained a little at random widths."""
    adapted = get_peft_model(backbone.model, lora(name, **settings))
    parameters = [each for each in adapted.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    generator = torch.Generator().manual_seed(seed(6))
    untouched = [each.clone() for each in parameters]
    for _ in range(4):
        with backbone.use(backbone.space.random(generator)):
            adapted(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with backbone.use(backbone.space.uniform(mlp=0.25, attention=0.25)):
        adapted(tokens, labels=tokens).loss.backward()
    assert all(each.grad is not None for each in parameters)
    assert not any(torch.equal(one, other) for one, other in zip(parameters, untouched, strict=True))
    return adapted.eval()


@pytest.mark.parametrize("form", ["none", "scales", "own"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_at_every_width_it_is_the_adapter_of_the_extracted_network(name, form, tokens, tmp_path):
    backbone = elastic(name, form)
    small = {widths: extract(backbone, SubNetwork(widths)) for widths in WIDTHS}
    adapted = trained(backbone, name, tokens)
    state = peft.get_peft_model_state_dict(adapted)
    seen = {}
    for widths, network in small.items():
        sub_network = SubNetwork(widths)
        bare = logits(network, tokens)
        with backbone.use(sub_network):
            seen[widths] = logits(adapted, tokens)
        # extraction takes it along
        assert differ(logits(extract(backbone, sub_network), tokens), seen[widths]) < TOLERANCE
        if form == "none" or widths == WIDTHS[0]:
            apart = get_peft_model(network, lora(name))
            peft.set_peft_model_state_dict(apart, sliced(backbone, sub_network, state))
            assert differ(seen[widths], logits(apart, tokens)) < TOLERANCE
        assert differ(seen[widths], bare) > 0.01
    # saved as peft does, and put on the same network again
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(elastic(name, form).model, tmp_path)
    merged = adapted.merge_and_unload()
    for widths, expected in seen.items():
        with backbone.use(SubNetwork(widths)):
            assert differ(logits(merged, tokens), expected) < TOLERANCE
        with again.model.get_submodule(backbone.family.layers)[0].mlp.elastic.selection.use(SubNetwork(widths)):
            assert torch.equal(logits(again, tokens), expected)


@pytest.mark.parametrize("form", ["none", "own"])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_tokens_with_widths_of_their_own_have_it_too(name, form, tokens, generator):
    backbone = elastic(name, form)
    adapted = trained(backbone, name, tokens)
    choices = mixture("random", backbone.space, tokens.shape, generator)

    def one_hot(block, hidden_states):
        return nn.functional.one_hot(choices[block], len(backbone.space.blocks[block].widths)).float()

    with torch.no_grad(), gated(backbone, one_hot):
        expected = adapted(tokens).logits
    with backbone.use(Fixed(choices)):
        found = logits(adapted, tokens)
        with adapted.disable_adapter():
            assert differ(logits(adapted, tokens), expected) > 0.01
    assert differ(found, expected) < TOLERANCE


def test_adapters_are_switched_merged_and_taken_out(tokens):
    backbone = elastic("llama-gqa", "own")
    half = backbone.space.uniform(mlp=0.5, attention=0.5)
    with backbone.use(half):
        bare = logits(backbone.model, tokens)
    adapted = get_peft_model(backbone.model, lora("llama-gqa")).eval()
    adapted.add_adapter("other", lora("llama-gqa", use_rslora=True))
    with ExitStack() as stack:
        stack.enter_context(backbone.use(half))
        one = logits(adapted, tokens)
        adapted.set_adapter("other")
        other = logits(adapted, tokens)
        adapted.base_model.set_adapter(["default", "other"])
        both = logits(adapted, tokens)
        adapted.merge_adapter()
        assert differ(logits(adapted, tokens), both) < TOLERANCE
        adapted.unmerge_adapter()
        assert differ(logits(adapted, tokens), both) < TOLERANCE
        with adapted.disable_adapter():
            assert differ(logits(adapted, tokens), bare) < TOLERANCE
        assert min(differ(one, bare), differ(other, one), differ(both, one), differ(both, other)) > 0.01
        # merged, and then the wrappers taken out without another word
        adapted.merge_adapter()
        plain = adapted.unload()
        assert differ(logits(plain, tokens), both) < TOLERANCE
    assert not backbone.adapted


def test_costs_are_those_of_the_network_without_it():
    backbone, other = elastic("gpt2", "none"), elastic("gpt2", "none")
    get_peft_model(backbone.model, lora("gpt2"))
    for name, count in COUNTED.items():
        assert count(backbone, Workload()) == count(other, Workload()), name
    assert backbone.parameters.keys() == other.parameters.keys()


class Louder(nn.Linear):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    @property
    def weight(self):
        return self.layer.weight

    @property
    def bias(self):
        return self.layer.bias

    def forward(self, inputs):
        return 2 * self.layer(inputs)


def put(change):
    """Replace the first layer's gate."""

    def do(model):
        mlp = model.model.layers[0].mlp
        mlp.gate_proj = change(mlp.gate_proj)

    return do


def on_gate(change):
    return lambda model: change(model.model.layers[0].mlp.gate_proj)


def louder(layer):
    made = Louder(layer.in_features, layer.out_features, bias=False)
    made.load_state_dict(layer.state_dict())
    return made


def tuner(config):
    return lambda model: get_peft_model(model, config)


FOREIGN = {
    "subclass": (put(louder), "gate_proj of .* is a Louder"),
    "wrapper": (put(Wrapped), "gate_proj of .* is a Wrapped"),
    "packed": (put(lambda layer: bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features)), "is a Linear4bit"),
    "forward hook": (on_gate(lambda layer: layer.register_forward_hook(lambda *_: None)), "carries hooks"),
    "forward pre-hook": (on_gate(lambda layer: layer.register_forward_pre_hook(lambda *_: None)), "carries hooks"),
    "backward hook": (on_gate(lambda layer: layer.register_full_backward_hook(lambda *_: None)), "carries hooks"),
    "forward": (on_gate(lambda layer: setattr(layer, "forward", lambda inputs: 0)), "a forward of its own"),
    "pruned": (on_gate(lambda layer: prune.random_unstructured(layer, "weight", 0.5)), "carries hooks"),
    "weight norm": (on_gate(parametrizations.weight_norm), "is a ParametrizedLinear"),
    "whole block": (lambda model: setattr(model.model.layers[0], "mlp", nn.Identity()), "layer.*is a Identity"),
    "dora": (tuner(LoraConfig(target_modules=["gate_proj"], use_dora=True)), "is a DoraLinearVariant"),
    "adalora": (
        tuner(peft.AdaLoraConfig(target_modules=["gate_proj"], total_step=9, tinit=1, tfinal=2)),
        "gate_proj of .* is a SVDLinear",
    ),
    "ia3": (tuner(peft.IA3Config(target_modules=["gate_proj"], feedforward_modules=[])), "gate_proj of .* is a Linear"),
    "lora bias": (tuner(LoraConfig(target_modules=["gate_proj"], lora_bias=True)), "an adapter adds one"),
    "saved module": (tuner(LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])), "ModulesToSaveWrapper"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOREIGN)
def test_what_narrower_widths_would_pass_by_is_refused(name, tokens):
    change, message = FOREIGN[name]
    backbone = ElasticBackbone(make_llama())
    change(backbone.model)
    half = backbone.space.uniform(mlp=0.5, attention=0.5)
    with pytest.raises(ValueError, match=message) as raised, backbone.use(half):
        logits(backbone.model, tokens)
    assert "\n" not in str(raised.value)
    # and when a folder would be written
    with pytest.raises(ValueError, match="in place|put it back|merge or remove"):
        backbone.refuse_foreign()


@pytest.mark.filterwarnings("ignore")
def test_the_full_network_runs_with_whatever_sits_on_it(tokens):
    backbone = ElasticBackbone(make_llama())
    full = logits(backbone.model, tokens)
    put(louder)(backbone.model)
    assert differ(logits(backbone.model, tokens), full) > 0.01


def test_an_adapter_outside_the_blocks_is_not_extracted():
    backbone = ElasticBackbone(make_llama(tie_word_embeddings=False))
    get_peft_model(backbone.model, LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="lm_head carries an adapter"):
        extract(backbone, backbone.space.smallest())


def test_a_copy_of_an_adapted_network_is_one(tokens):
    backbone = elastic("llama-gqa", "own")
    adapted = get_peft_model(backbone.model, lora("llama-gqa")).eval()
    other = copy.deepcopy(adapted)
    assert torch.equal(logits(other, tokens), logits(adapted, tokens))
