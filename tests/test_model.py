"""`FlextronModel`: the elastic network as the ecosystem expects a model."""

import copy
import pickle
import shutil
import subprocess
import sys
import tomllib
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from setuptools import find_namespace_packages
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    pipeline,
)

import flextron_lit
from flextron_lit import FlextronModel, checkpoint
from flextron_lit.costs import Workload
from flextron_lit.elastic import extract
from flextron_lit.routers.dynamic import DynamicPolicy
from flextron_lit.routers.staleness import stale_files
from flextron_lit.sources import load_tokenizer
from tests.conftest import make_gpt2, with_compensation
from tests.front_door import ROOT
from tests.options import seed
from tests.served import TINY, write

TOKENS = torch.randint(1, 250, (1, 12), generator=torch.Generator().manual_seed(seed(5)))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256}
BUDGETS = [(0.6, False), ("parameters<=0.4", False), (0.8, True), ("flops=0.9", True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served") / "flextron")


@pytest.fixture
def model(folder):
    return FlextronModel.from_pretrained(folder)


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def generate(model, **settings):
    return model.generate(TOKENS, **(GREEDY | settings))


def is_full(model):
    return model.backbone.selection.current == model.backbone.space.full()


# --- what it is -------------------------------------------------------------------------------------------------


def test_it_is_the_stock_class_with_budgets(model):
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, FlextronModel)
    assert flextron_lit.FlextronModel is FlextronModel
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)
    assert model.config.num_hidden_layers == 3
    assert model.tokenizer.decode(model.tokenizer("owl")["input_ids"]) == "owl"
    assert is_full(model)


def test_the_plain_dense_model_is_what_auto_classes_read(folder, model):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(logits(plain), logits(model))
    model.set_budget(0.6)
    assert not torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("name", ["folder", "run folder", "dense", "random"])
def test_any_source_will_do(folder, tmp_path, name):
    if name == "run folder":
        shutil.copytree(folder, tmp_path / "flextron")
    elif name == "dense":
        make_gpt2(vocab_size=260).save_pretrained(tmp_path)
        load_tokenizer(TINY).save_pretrained(tmp_path)
    source = {"folder": str(folder), "random": TINY}.get(name, tmp_path)
    model = FlextronModel.from_pretrained(source, attn_implementation="eager")
    assert isinstance(model, GPT2LMHeadModel if name == "dense" else LlamaForCausalLM)
    assert model.config._attn_implementation == "eager"
    full = logits(model)
    with model.use(model.backbone.space.uniform(mlp=0.5)):
        assert not torch.equal(logits(model), full)
    assert torch.equal(logits(model), full)
    assert len(model(TOKENS, output_attentions=True).attentions) == 3


def test_precision_is_as_asked_for(folder):
    model = FlextronModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.dtype == model.backbone.model.dtype == torch.bfloat16
    assert generate(model, budget=0.8, dynamic=True).shape[1] > TOKENS.shape[1]


def test_a_copy_is_a_network_of_its_own(model):
    other = copy.deepcopy(model)
    full = logits(model)
    other.set_budget(0.6)
    assert is_full(model)
    assert not torch.equal(logits(other), full)
    other.set_budget(1.0)
    assert torch.equal(logits(other), full)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(2)
    assert torch.equal(logits(model), full)
    assert not torch.equal(logits(other), full)


def test_what_is_extracted_is_stock(model):
    answer = model.set_budget(0.6)
    small = extract(model.backbone, answer.sub_network)
    assert type(small) is LlamaForCausalLM
    assert torch.allclose(logits(small), logits(model), atol=1e-5)
    assert small.num_parameters() < model.num_parameters()


def test_it_is_one_object(model):
    assert model.backbone.model is model
    assert model.train().backbone.model.training
    assert not model.eval().training
    config, settings = copy.deepcopy(model.config), GenerationConfig(max_new_tokens=3)
    model.config, model.generation_config = config, settings
    assert model.backbone.model.config is config
    assert model.backbone.model.generation_config is settings


def test_what_is_set_on_it_is_saved(model, tmp_path):
    model.generation_config = GenerationConfig(max_new_tokens=3, repetition_penalty=1.5)
    model.config = copy.deepcopy(model.config)
    model.config.pad_token_id = 7
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    model.save_pretrained(tmp_path / "set")
    again = FlextronModel.from_pretrained(tmp_path / "set")
    assert again.generation_config.repetition_penalty == 1.5
    assert again.config.pad_token_id == 7
    assert again.tokenizer.pad_token == "<pad>"


def test_undone_it_is_stock_again(model):
    full = logits(model)
    stock = model.backbone.undo()
    assert type(stock) is LlamaForCausalLM
    assert torch.equal(logits(stock), full)


@pytest.mark.parametrize("way", ["pickle", "torch"])
def test_it_can_be_pickled(model, tmp_path, way):
    model.set_budget(0.6)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert type(again) is type(model)
    assert torch.equal(logits(again), logits(model))
    assert again.set_budget(0.8) == model.set_budget(0.8)
    assert torch.equal(logits(again), logits(model))
    again.set_budget(1.0)
    assert not is_full(model)


# --- Hugging Face's keywords ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"device_map": None, "trust_remote_code": False, "use_safetensors": True, "low_cpu_mem_usage": True},
        {"local_files_only": True, "revision": "main", "token": None, "cache_dir": None},
    ],
)
def test_keywords_of_loading_that_ask_for_what_is_done(folder, model, options):
    again = FlextronModel.from_pretrained(pretrained_model_name_or_path=folder, **options)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"torch_dtype": torch.bfloat16}, {"dtype": "auto"}])
def test_the_precision_has_several_spellings(folder, tmp_path, options):
    FlextronModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert FlextronModel.from_pretrained(tmp_path / "half", **options).dtype == torch.bfloat16
    assert FlextronModel.from_pretrained(tmp_path / "half").dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "balanced"}, "lies on one device"),
        ({"device_map": {"a": 0, "b": "cpu"}}, "lies on one device"),
        ({"revision": "v2"}, "revision='v2' has no effect"),
        ({"quantization_config": object()}, "quantise after export"),
        ({"load_in_4bit": True}, "quantise after export"),
        ({"trust_remote_code": True}, "no code of a model's folder is run"),
        ({"cache_dir": "/tmp"}, "set HF_HOME"),
        ({"dtype": "int8"}, "none that weights can have"),
        ({"use_cache": False}, r"from_pretrained\(use_cache=False\): it has no effect here"),
    ],
)
def test_other_keywords_of_loading_are_refused_with_the_reason(folder, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        FlextronModel.from_pretrained(folder, **options)
    assert "\n" not in str(raised.value)


def test_keywords_of_saving_that_are_honoured(model, tmp_path):
    model.save_pretrained(save_directory=tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    # None of them means today's
    model.save_pretrained(tmp_path / "same", state_dict=None, safe_serialization=True, token=None, variant=None)
    model.save_pretrained(tmp_path / "doubled", state_dict=doubled, max_shard_size="20KB")
    assert torch.equal(logits(FlextronModel.from_pretrained(tmp_path / "same")), logits(model))
    again = FlextronModel.from_pretrained(tmp_path / "doubled")
    assert torch.equal(again.state_dict()["model.norm.weight"], doubled["model.norm.weight"])
    assert len(checkpoint.weight_files(tmp_path / "doubled")) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"push_to_hub": True}, "hf upload"),
        ({"safe_serialization": False}, "nothing is pickled"),
        ({"variant": "fp16"}, "one set of weights"),
        ({"distributed_checkpoint": True}, "written by one process"),
        ({"nonsense": 1}, r"save_pretrained\(nonsense=1\)"),
        ({"state_dict": {"what": torch.ones(1)}}, "1 are unknown"),
    ],
)
def test_other_keywords_of_saving_are_refused_with_the_reason(model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message) as raised:
        model.save_pretrained(tmp_path / "no", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "no").exists()


def test_own_weights_of_narrower_widths_come_from_a_state_dict_too(folder, tmp_path):
    model = FlextronModel.from_pretrained(folder)
    with_compensation(model.backbone)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    half = model.backbone.space.uniform(mlp=0.5)
    with model.use(half):
        expected = logits(model)
    with torch.no_grad():
        for own in model.backbone.compensations.values():
            own.zero_()
    model.save_pretrained(tmp_path / "given", state_dict=state)
    again = FlextronModel.from_pretrained(tmp_path / "given")
    with again.use(half):
        assert torch.equal(logits(again), expected)
    # the weight file alone would leave them as they are
    with pytest.raises(ValueError, match="load the folder with FlextronModel.from_pretrained"):
        model.load_state_dict(load_file(tmp_path / "given/model.safetensors"), strict=False)


def test_files_of_others_stay_where_a_network_is_saved(model, tmp_path):
    for name in ("optimizer.pt", "checkpoint-2/state.json", "model-00001-of-00002.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("theirs")
    model.save_pretrained(tmp_path)
    (tmp_path / "elastic").mkdir(exist_ok=True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_text() == (tmp_path / "checkpoint-2/state.json").read_text() == "theirs"
    # not what a loader would take for weights
    assert not (tmp_path / "model-00001-of-00002.safetensors").exists()
    # a Trainer writes the tokenizer again
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path)
    assert FlextronModel.from_pretrained(tmp_path).tokenizer.pad_token == "<pad>"
    # but weights are sealed
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match="is damaged"):
        FlextronModel.from_pretrained(tmp_path)


def test_an_adapter_is_merged_before_the_network_is_saved(folder, model, tmp_path):
    with_compensation(model.backbone)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    with pytest.raises(ValueError, match="merge them first"):
        model.save_pretrained(tmp_path / "no")
    # costs hold, answers say that they are of the network without it
    answer = adapted.set_budget(0.6)
    assert "this router is stale: an adapter has changed" in answer.how
    assert answer.sub_network == FlextronModel.from_pretrained(folder).set_budget(0.6).sub_network
    expected, text = logits(adapted), generate(adapted)
    assert torch.equal(generate(adapted, budget=0.6), text)
    with pytest.warns(UserWarning, match="stale: an adapter has changed"):
        generate(adapted, budget=0.8, dynamic=True)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = FlextronModel.from_pretrained(tmp_path / "merged")
    assert "stale: training in Python" in again.set_budget(0.6).how
    assert torch.allclose(logits(again), expected, atol=1e-4)


# --- budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "dynamic"), BUDGETS)
def test_a_budget_of_one_call_is_that_budget_set_and_taken_back(model, budget, dynamic):
    full = generate(model)
    once = generate(model, budget=budget, dynamic=dynamic)
    assert is_full(model)
    assert torch.equal(generate(model), full)
    model.set_budget(budget, dynamic)
    assert torch.equal(generate(model), once)
    assert not torch.equal(once, full)
    # the call's own budget goes before what is set, and leaves it
    assert torch.equal(generate(model, budget=1.0), full)
    assert torch.equal(generate(model), once)


def test_set_budget_says_what_it_found(model):
    answer = model.set_budget(0.6)
    assert answer.how == "a look-up in the ladder of the router for parameters"
    assert model.backbone.selection.current == answer.sub_network
    assert model.set_budget(0.6, workload=Workload(prompt_tokens=8)) == answer
    policy = model.set_budget(0.8, dynamic=True)
    assert model.backbone.selection.current is policy
    logits(model)
    assert policy.take().sum(-1).tolist() == [TOKENS.shape[1]] * 6
    assert model.set_budget(1.0, dynamic=True) == model.backbone.space.full()


def test_a_call_that_fails_gives_the_budget_back(model):
    with pytest.raises(ValueError, match="nonsense"):
        generate(model, budget=0.6, nonsense=1)
    assert is_full(model)


def test_every_sequence_can_have_its_own_budget(model):
    both = TOKENS.repeat(2, 1)
    settings = GREEDY | {"eos_token_id": None, "dynamic": True}
    together = model.generate(both, budget=[0.75, 0.95], **settings)
    apart = [model.generate(TOKENS, budget=budget, **settings)[0] for budget in (0.75, 0.95)]
    assert torch.equal(together, torch.stack(apart))
    assert not torch.equal(*apart)


def test_pipelines_take_a_budget_with_every_call(model):
    prompt = "Ada feeds the"
    pipe = pipeline("text-generation", model=model, tokenizer=model.tokenizer, device=-1, return_full_text=False)
    inputs = model.tokenizer(prompt, return_tensors="pt")

    def expected(**settings):
        new = model.generate(**inputs, **GREEDY, **settings)[0, inputs["input_ids"].shape[1] :]
        return model.tokenizer.decode(new, skip_special_tokens=True)

    settings = {"max_new_tokens": 12, "do_sample": False}
    answers = {pipe(prompt, **settings, **each)[0]["generated_text"] for each in ({}, {"budget": 0.6})}
    assert answers == {expected(), expected(budget=0.6)}
    assert len(answers) == 2
    dynamic = pipe(prompt, budget=0.8, dynamic=True, **settings)[0]["generated_text"]
    assert dynamic == expected(budget=0.8, dynamic=True)
    assert is_full(model)
    # or one for all calls
    always = pipeline(
        "text-generation", model=model, tokenizer=model.tokenizer, device=-1, return_full_text=False, budget=0.6
    )
    assert always(prompt, **settings)[0]["generated_text"] == expected(budget=0.6)


def test_a_pipeline_has_nothing_to_say_against_it(model, monkeypatch):
    said = []
    monkeypatch.setattr("transformers.pipelines.base.logger.error", said.append)
    made = {"model": model, "tokenizer": model.tokenizer, "device": -1}
    pipeline("text-generation", **made)
    assert said == []
    # of a class of any other name it has
    model.__class__ = type("ElasticModel", (type(model),), {})
    pipeline("text-generation", **made)
    assert "ElasticModel" in said[0]


def test_phases_have_budgets_of_their_own(model):
    both = generate(model, budget={"prompt": 0.6, "answer": 0.6})
    assert torch.equal(both, generate(model, budget=0.6))
    apart = generate(model, budget={"prompt": 1.0, "answer": 0.3})
    assert not torch.equal(apart, generate(model, budget=0.3))
    # what the prompt's sub-network decides alone
    assert torch.equal(apart[:, :13], generate(model)[:, :13])
    thinks = {"think": 0.3, "answer": 1.0}
    narrow = generate(model, budget=0.3)
    switch = narrow[0, 12:14].tolist()
    switched = generate(model, budget=thinks, switch=switch)
    assert torch.equal(switched[:, :14], narrow[:, :14])
    assert not torch.equal(switched, narrow)
    assert is_full(model)


def test_sequences_of_a_batch_have_budgets_of_their_own(model):
    batch = torch.cat([TOKENS, TOKENS.flip(1), TOKENS])
    budgets = [0.6, {"prompt": 1.0, "answer": 0.3}, 0.2]
    alone = [model.generate(row[None], budget=budget, **GREEDY) for row, budget in zip(batch, budgets, strict=True)]
    found = model.generate(batch, budget=budgets, **GREEDY)
    longest = found.shape[1]
    padded = [torch.nn.functional.pad(each, (0, longest - each.shape[1]), value=256) for each in alone]
    assert torch.equal(found, torch.cat(padded))
    # the control: their budgets differ
    assert not torch.equal(found, model.generate(batch, budget=0.6, **GREEDY))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.set_budget([0.6, 0.7]), r"one sub-network has one budget, not \[0.6, 0.7\]"),
        (lambda m: generate(m, budget=[0.6, 0.7]), "2 budgets and 1 sequences in the batch"),
        (
            lambda m: generate(m, budget=[0.6], return_dict_in_generate=True),
            "return_dict_in_generate is of the whole batch",
        ),
        (lambda m: generate(m, budget={"answer": 0.6}, dynamic=True), "with dynamic=True give one budget"),
        (lambda m: generate(m, budget=0.6, switch="."), "a switch has no effect without one"),
        (lambda m: generate(m, dynamic=True), "dynamic has no effect without a budget"),
        (lambda m: m.set_budget(0.8, dynamic=True, latency="mine"), "latency has no effect with dynamic=True"),
        (lambda m: m.set_budget(0.6, latency="mine"), "no latency table 'mine'"),
        (lambda m: m.set_budget(0.001), "the smallest parameters possible is"),
        (lambda m: m.set_budget(0.6, dynamic=True), "meets budgets of 0.750 and more, not 0.6"),
        (lambda m: m.set_budget("quickly"), "cannot read the budget 'quickly'"),
    ],
)
def test_a_mistake_is_one_clear_error(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)
    assert is_full(model)


def test_a_network_without_routers_says_what_is_missing(tmp_path):
    model = FlextronModel.from_pretrained(write(tmp_path / "bare", routers=()))
    with pytest.raises(ValueError, match="no router, no surrogate and no excess losses"):
        model.set_budget(0.6)
    with pytest.raises(ValueError, match="holds no dynamic router"):
        generate(model, budget=0.8, dynamic=True)
    assert model.set_budget(1.0).how == "the full network meets it"
    with pytest.raises(ValueError, match="there is neither"):
        FlextronModel.from_pretrained(tmp_path)


def test_a_dynamic_router_says_that_it_is_stale(folder, model, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_budget(0.8, dynamic=True)
    files = stale_files(folder, model.backbone.space, "JointTuning")
    checkpoint.extend(folder, tmp_path / "stale", files=files)
    stale = FlextronModel.from_pretrained(tmp_path / "stale")
    with pytest.warns(UserWarning, match="the dynamic router for flops is stale: JointTuning has changed the network"):
        stale.set_budget(0.8, dynamic=True)
    assert isinstance(stale.backbone.selection.current, DynamicPolicy)


# --- saving -----------------------------------------------------------------------------------------------------


def test_what_is_saved_comes_back(folder, model, tmp_path):
    # whatever is active, the full network is saved
    model.set_budget(0.6)
    model.save_pretrained(tmp_path / "again")
    again = FlextronModel.from_pretrained(tmp_path / "again")
    assert checkpoint.verify(tmp_path / "again")
    for budget, dynamic in [(1.0, False), *BUDGETS]:
        model.set_budget(budget, dynamic)
        again.set_budget(budget, dynamic)
        assert torch.equal(logits(again), logits(model)), budget
    assert again.set_budget(0.6) == model.set_budget(0.6)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) is LlamaForCausalLM
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("owl") == model.tokenizer("owl")
    for name in (
        "elastic/order.safetensors",
        "config.json",
        *(p.relative_to(folder) for p in folder.glob("routers/*")),
    ):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name


def test_a_checkpoint_can_replace_itself(folder, model, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    own = FlextronModel.from_pretrained(tmp_path / "own")
    own.save_pretrained(tmp_path / "own")
    assert FlextronModel.from_pretrained(tmp_path / "own").set_budget(0.6) == model.set_budget(0.6)


def test_routers_of_weights_that_were_trained_since_are_stale(model, tmp_path):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "trained")
    again = FlextronModel.from_pretrained(tmp_path / "trained")
    assert torch.equal(logits(again), logits(model))
    assert "this router is stale: training in Python has changed" in again.set_budget(0.6).how
    with pytest.warns(UserWarning, match="stale: training in Python"):
        again.set_budget(0.8, dynamic=True)


def test_precision_makes_no_router_stale(folder, tmp_path):
    FlextronModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "short")
    assert load_file(tmp_path / "short/model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert "stale" not in FlextronModel.from_pretrained(tmp_path / "short").set_budget(0.6).how


def test_a_dense_model_is_saved_as_an_elastic_one(tmp_path):
    model = FlextronModel.from_pretrained(TINY)
    model.save_pretrained(tmp_path / "elastic")
    record = checkpoint.read(tmp_path / "elastic")
    assert record.history == []
    assert record.space == model.backbone.space
    assert record.space.num_sub_networks > 1
    assert torch.equal(logits(FlextronModel.from_pretrained(tmp_path / "elastic")), logits(model))


# --- the package ------------------------------------------------------------------------------------------------


def test_importing_the_package_is_light_until_the_model_is_asked_for():
    probe = (
        "import sys, flextron_lit; light = 'torch' not in sys.modules; flextron_lit.FlextronModel; "
        "print(light, 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "True True\n"
    with pytest.raises(AttributeError, match="no attribute 'FlextronMode'"):
        flextron_lit.FlextronMode  # noqa: B018


def test_an_installation_holds_every_package():
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = find_namespace_packages(str(ROOT), include=about["tool"]["setuptools"]["packages"]["find"]["include"])
    sources = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "flextron_lit").rglob("*.py")}
    assert {*sources, "flextron_lit.callbacks"} <= set(found)
    assert {name.partition(".")[0] for name in found} == {"flextron_lit"}
