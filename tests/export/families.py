"""Tiny models of every family that is exported, with a real byte-level BPE tokenizer, as Flextron checkpoints."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from flextron_lit import checkpoint
from flextron_lit.checkpoint import StageRecord
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.export.gguf_tokenizer import KNOWN
from flextron_lit.space import SpaceConfig
from tests.conftest import make_gpt2, make_llama, randomised, with_compensation

VOCABULARY = 320
TEXT = (
    "The mill's owl counts 1234 grains, and 56 more; Ada doesn't. " * 8
    + "Does the miller?\n\n  He'll see it at 7:30!\n"
)
SPACE = SpaceConfig(mlp=[0, 32, 64, 128], attention=[0, 1, 3, 4])

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}
# 3 of 4 groups are 6 heads, which do not divide 64
WIDE = {"head_dim": 16}


def _of(config_class, model_class, **settings):
    return lambda **more: randomised(model_class(config_class(**(settings | more), attn_implementation="sdpa")))


MAKE = {
    "llama": lambda **more: make_llama(**(GROUPED | WIDE | more)),
    "mistral": _of(MistralConfig, MistralForCausalLM, **GROUPED, **WIDE, sliding_window=None),
    "qwen2": _of(Qwen2Config, Qwen2ForCausalLM, **GROUPED),
    "qwen3": _of(Qwen3Config, Qwen3ForCausalLM, **GROUPED, **WIDE),
    "smollm3": _of(SmolLM3Config, SmolLM3ForCausalLM, **GROUPED),
    "gemma": _of(GemmaConfig, GemmaForCausalLM, **GROUPED, **WIDE),
    "gpt2": lambda **more: make_gpt2(
        **{"vocab_size": VOCABULARY, "n_embd": 64, "n_inner": 128, "eos_token_id": 0, "pad_token_id": 0} | more
    ),
    "gpt_neox": _of(GPTNeoXConfig, GPTNeoXForCausalLM, **SIZES | {"num_attention_heads": 4}),
}


def make_tokenizer(pre="smollm"):
    """A byte-level BPE tokenizer that cuts text like one that llama.cpp knows."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _pre_tokenizer(KNOWN[pre])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=310, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def _pre_tokenizer(described):
    kind = described["type"]
    if kind == "Sequence":
        return pre_tokenizers.Sequence([_pre_tokenizer(each) for each in described["pretokenizers"]])
    if kind == "Split":
        return pre_tokenizers.Split(Regex(described["pattern"]["Regex"]), "isolated")
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=described["use_regex"])


def write_checkpoint(folder, model, tokenizer=None, space=SPACE):
    """A Flextron checkpoint as a stage leaves it, with its units in the order of the dense model."""
    backbone = with_compensation(ElasticBackbone(model, space))
    order = [torch.arange(block.full) for block in backbone.space.blocks]
    history = [
        StageRecord(
            stage="ElasticTraining",
            steps=0,
            tokens=0,
            seed=0,
            source="hub:somebody/something@main",
            data={},
            settings={},
            calibration=None,
            versions={},
            git_commit=None,
        )
    ]
    checkpoint.write(folder, backbone, tokenizer or make_tokenizer(), order=order, history=history)
    return folder
