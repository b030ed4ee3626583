"""Folders are written so that transformers 4.57 reads them too; tests/export/test_older_transformers.py has it read."""

import json
import runpy

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaTokenizer, LlamaTokenizer

from flextron_lit.checkpoint.plain_folder import save_model, save_tokenizer
from flextron_lit.elastic.remote_code import flextron_layers
from flextron_lit.sources import load_tokenizer
from tests.conftest import make_gpt2, make_gpt_neox, make_llama, make_rotary
from tests.export.families import make_tokenizer

THETA = {"rope_theta": 500000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"factor": 3.0, "original_max_position_embeddings": 8, "short_factor": [1.0, 1.5], "long_factor": [2.0, 2.5]}
MODELS = {
    "theta": (make_llama, {"rope_type": "default"}, {"rope_theta"}),
    "linear": (make_llama, {"rope_type": "linear", "factor": 2.0}, {"rope_theta", "rope_scaling"}),
    "dynamic": (make_llama, {"rope_type": "dynamic", "factor": 2.0}, {"rope_theta", "rope_scaling"}),
    "llama3": (make_llama, {"rope_type": "llama3", **LLAMA3}, {"rope_theta", "rope_scaling"}),
    "longrope": (
        make_llama,
        {"rope_type": "longrope", **LONG},
        {"rope_theta", "rope_scaling", "original_max_position_embeddings"},
    ),
    "gpt-neox": (
        make_gpt_neox,
        {"rope_type": "default", "partial_rotary_factor": 0.5},
        {"rotary_emb_base", "rotary_pct"},
    ),
    "gpt-neox-linear": (
        make_gpt_neox,
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base", "rotary_pct", "rope_scaling"},
    ),
    "qwen3": (
        lambda **more: make_rotary(transformers.Qwen3ForCausalLM, **more),
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {"rope_theta", "rope_scaling"},
    ),
}


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_the_older_names_say_the_same_alone(tmp_path, tokens, case):
    make, rope, names = MODELS[case]
    model = make(rope_parameters={**THETA, **rope})
    save_model(tmp_path, model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in config
    expected = model(tokens).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected)
    # transformers 5 reads the older names too
    alone = {name: value for name, value in config.items() if name != "rope_parameters"}
    (tmp_path / "config.json").write_text(json.dumps(alone))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected)
    # the control: without them it is another network
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in alone.items() if k not in names}))
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, expected, atol=1e-4)


def test_a_model_without_rotary_positions_has_none_of_them(tmp_path):
    save_model(tmp_path, make_gpt2())
    assert not [name for name in json.loads((tmp_path / "config.json").read_text()) if "rope" in name or "rot" in name]


def sentence_pieces():
    """A tokenizer as Llama 2 has it, of a class that in 4.57 puts a token in front by itself."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "o", "w", "ow"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return LlamaTokenizer(vocab=vocab, merges=[("o", "w")], add_bos_token=False)


def with_begin():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", 0)]
    )
    return tokenizer


@pytest.mark.parametrize("make", [make_tokenizer, sentence_pieces, with_begin])
def test_a_tokenizer_says_nothing_that_only_one_release_knows(tmp_path, make):
    tokenizer = make()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one>"]})
    tokenizer.save_pretrained(tmp_path / "source")
    make_llama().config.save_pretrained(tmp_path / "source")
    # what is loaded here notes how it was loaded
    save_tokenizer(tmp_path / "written", load_tokenizer(f"random:{tmp_path / 'source'}"))
    said = json.loads((tmp_path / "written/tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["additional_special_tokens"] == ["<one>"]
    assert said["model_input_names"] == ["input_ids", "attention_mask"]
    assert not {"extra_special_tokens", "local_files_only", "is_local", "backend", "add_bos_token"} & said.keys()
    again = AutoTokenizer.from_pretrained(tmp_path / "written")
    for text in ("an owl", " <one>ow  x", ""):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert "<one>" in again.all_special_tokens


def test_what_a_class_had_by_default_stays(tmp_path):
    vocab = {name: index for index, name in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", "▁", "o", "w", "ow"))}
    save_tokenizer(tmp_path, GemmaTokenizer(vocab=vocab, merges=[("o", "w")]))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is not GemmaTokenizer
    assert again.padding_side == "left"


def test_our_own_classes_say_which_release_they_need(monkeypatch):
    monkeypatch.setattr(transformers, "PretrainedConfig", object)
    with pytest.raises(ImportError, match=rf"transformers {transformers.__version__} cannot read: pip install") as told:
        runpy.run_path(flextron_layers.__file__)
    assert "\n" not in str(told.value)
