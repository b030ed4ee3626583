"""Every family, kind of sub-network and format; loaded by `elsewhere.py`, where there is no flextron_lit."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from tests.export.conftest import KINDS
from tests.export.families import MAKE

RELATIVE = 1e-5
WRONG = 1e-3
OWN = {
    "llama": "FlextronLlamaForCausalLM",
    "mistral": "FlextronMistralForCausalLM",
    "qwen2": "FlextronQwen2ForCausalLM",
    "qwen3": "FlextronQwen3ForCausalLM",
    "smollm3": "FlextronSmolLM3ForCausalLM",
    "gemma": "FlextronGemmaForCausalLM",
    "gpt2": "FlextronGPT2LMHeadModel",
    "gpt_neox": "FlextronGPTNeoXForCausalLM",
}
STOCK = {family: name.removeprefix("Flextron") for family, name in OWN.items()}
# where --format hf falls back on a class of ours, or takes another stock one
CLASSES = {
    (family, kind): OWN[family] if kind in ("differ", "skips") else STOCK[family] for family in MAKE for kind in KINDS
} | {
    ("llama", "uniform"): "MistralForCausalLM",
    ("gpt2", "uniform"): OWN["gpt2"],
    ("gpt_neox", "uniform"): OWN["gpt_neox"],
}
NO_GGUF = {
    (family, kind): reason
    for family, kinds, reason in (
        (
            "qwen2",
            ("differ", "skips"),
            "no GGUF of this qwen2: its layers differ in width, and what llama.cpp has for that",
        ),
        ("qwen2", ("uniform",), "llama.cpp demands that the heads fill the hidden size of 64, and 6 of size 8 do not"),
        ("qwen3", ("differ", "skips"), "(deci) has no norms of queries and keys"),
        ("smollm3", ("differ", "skips"), "(deci) has no layers without positions"),
        ("gemma", KINDS, "no GGUF of gemma: only networks like Llama are written"),
        ("gpt2", KINDS, "no GGUF of gpt2: only networks like Llama are written"),
        ("gpt_neox", KINDS, "no GGUF of gpt_neox: only networks like Llama are written"),
    )
    for kind in kinds
}
CELLS = [(family, kind) for family in MAKE for kind in KINDS]


@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_every_cell_works_or_says_why(matrix, family, kind):
    assert matrix[family, kind, "hf"].refusal is None
    cell = matrix[family, kind, "gguf"]
    if (family, kind) in NO_GGUF:
        assert NO_GGUF[family, kind] in cell.refusal
        assert "\n" not in cell.refusal
        assert not cell.folder.exists()
    else:
        assert cell.refusal is None
        assert (cell.folder / "model.gguf").is_file()


@pytest.mark.parametrize(("family", "kind"), CELLS)
@torch.no_grad()
def test_it_loads_without_this_project_and_computes_the_same(elsewhere, backbones, ids, family, kind):
    tensors, note = elsewhere[f"{family}-{kind}-hf"]
    assert note["class"] == CLASSES[family, kind]
    assert note["module"].startswith("transformers." if note["class"] != OWN[family] else "transformers_modules.")
    backbone = backbones[family]
    with backbone.use(KINDS[kind](backbone.space)):
        expected = backbone.model(ids, use_cache=False).logits
    allowed = RELATIVE * expected.abs().max()
    assert (tensors["logits"] - expected).abs().max() <= allowed
    assert (tensors["eager"] - expected).abs().max() <= allowed
    other = "narrow-mlp" if kind != "narrow-mlp" else "full"
    with backbone.use(KINDS[other](backbone.space)):
        assert (tensors["logits"] - backbone.model(ids, use_cache=False).logits).abs().max() > WRONG


@pytest.mark.parametrize(("family", "kind"), CELLS)
def test_it_generates_with_and_without_a_cache(elsewhere, backbones, ids, family, kind):
    tensors, _ = elsewhere[f"{family}-{kind}-hf"]
    backbone = backbones[family]
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with backbone.use(KINDS[kind](backbone.space)):
        expected = backbone.model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    for way in ("cached", "uncached", "static"):
        assert torch.equal(tensors[way], expected), way
    assert len({tuple(elsewhere[f"{family}-{k}-hf"][0]["cached"].flatten().tolist()) for k in KINDS}) > 3


def test_attention_weights_are_those_of_the_heads_that_are_left(elsewhere):
    # sdpa gives none, so every layer has followed the switch to eager
    assert elsewhere["llama-differ-hf"][1]["heads"] == [8, 2, 6]
    assert elsewhere["llama-skips-hf"][1]["heads"] == [6, 8]
    assert elsewhere["gpt2-differ-hf"][1]["heads"] == [4, 1, 3]
    assert elsewhere["gpt_neox-skips-hf"][1]["heads"] == [3, 4]


def test_the_tokenizer_comes_along(elsewhere, checkpoints):
    expected = AutoTokenizer.from_pretrained(checkpoints["llama"])("The owl.")["input_ids"]
    assert len(expected) > 1
    assert all(note["tokens"] == expected for _, note in elsewhere.values())


def test_the_code_of_every_model_card_runs(elsewhere):
    assert "llama-own-int8" in elsewhere
    for name, (_, note) in elsewhere.items():
        assert "Once upon a time" in note["card"], name


def test_an_own_class_asks_for_trust_and_a_stock_one_does_not(elsewhere):
    for name, (_, note) in elsewhere.items():
        if note["class"].startswith("Flextron"):
            assert "trust_remote_code" in note["untrusted"], name
        else:
            assert note["untrusted"] is None, name


def test_an_own_folder_says_the_widths_of_its_layers(matrix):
    folder = matrix["llama", "skips", "hf"].folder
    config = json.loads((folder / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 64},
        "1": {"skip": ["self_attn"], "intermediate_size": 32},
        "2": {"skip": ["mlp"]},
    }
    assert config["num_attention_heads"] == 8
    python = {path.name for path in folder.glob("*.py")}
    assert python == {"modeling_flextron_llama.py", "flextron_layers.py"}
    assert not list(matrix["llama", "full", "hf"].folder.glob("*.py"))
