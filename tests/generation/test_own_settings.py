"""What a model's own files say of generating: nothing of it reaches a command's text but what ends it."""

import copy

import pytest
import torch
from transformers import GenerationConfig, TextIteratorStreamer

from flextron_lit import FlextronModel
from flextron_lit.generation.call import generate, settings_for
from flextron_lit.generation.own_settings import BESIDE, ENDS, unused
from flextron_lit.generation.prompt import encoded
from tests.conftest import randomised
from tests.served import TINY

NEW = 6
SAID = {
    "max_length": 12,
    "max_new_tokens": 3,
    "min_length": 40,
    "min_new_tokens": 3,
    "early_stopping": True,
    "max_time": 1e-9,
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 10,
    "temperature": 0.6,
    "top_k": 5,
    "top_p": 0.5,
    "min_p": 0.2,
    "top_h": 0.3,
    "typical_p": 0.5,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 1.9,
    "encoder_repetition_penalty": 2.0,
    "length_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[each] for each in range(100, 250)],
    "renormalize_logits": True,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 256,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 2.0),
    "suppress_tokens": list(range(100, 250)),
    "begin_suppress_tokens": [1],
    "sequence_bias": [[[7], 100.0]],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 9.0},
    "num_return_sequences": 3,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 2,
    "is_assistant": True,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 1,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash",
    "compile_config": {"fullgraph": False},
    "disable_compile": True,
    "continuous_batching_config": {"max_batch_tokens": 1},
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 1.0,
    "num_beam_groups": 3,
    "constraints": [1],
    "force_words_ids": [[5]],
    "prefill_chunk_size": 2,
    # one that the library does not know
    "chat_format": "chatml",
}


@pytest.fixture(scope="module")
def model():
    loaded = FlextronModel.from_pretrained(TINY)
    randomised(loaded.backbone.model)
    return loaded


@pytest.fixture
def says(model, monkeypatch):
    """Have the model's files say something, as if it had been read with it."""

    plain = model.generation_config

    def of(**said):
        config = copy.deepcopy(plain)
        for name, value in said.items():
            setattr(config, name, value)
        for each in (model, model.backbone.model):
            monkeypatch.setattr(each, "generation_config", config)

    return of


def made(model, *, drafted=False, streamer=None, **asked):
    space = model.backbone.space
    drafting = {"draft": space.uniform(mlp=0.5), "draft_tokens": 3} if drafted else None
    torch.manual_seed(0)
    inputs = encoded(model.tokenizer, model.config, "Ada feeds the owl", chat=False)
    return generate(model, inputs, space.full(), settings_for(model.tokenizer, NEW, **asked), streamer, drafting)


def test_every_setting_of_the_library_is_tried():
    assert GenerationConfig().to_dict().keys() - SAID.keys() == ENDS | BESIDE


def test_what_was_not_asked_for_is_off(model, says):
    expected = made(model).text
    for name, value in SAID.items():
        says(**{name: value})
        assert made(model).text == expected, name


@pytest.mark.parametrize("asked", [{}, {"temperature": 0.7}, {"drafted": True}], ids=["likeliest", "drawn", "drafted"])
def test_nor_do_all_of_them_together_change_a_text(model, says, asked):
    expected = made(model, **asked).text
    says(**SAID)
    # with beams the library refuses a streamer
    assert made(model, streamer=TextIteratorStreamer(model.tokenizer), **asked).text == expected
    # whoever asks the model itself is told them still
    for each in (model, model.backbone.model):
        assert {name: getattr(each.generation_config, name) for name in SAID} == SAID


def test_it_is_told_what_was_not_used(model, says):
    plain, drawn = settings_for(model.tokenizer, NEW), settings_for(model.tokenizer, NEW, temperature=0.6)
    assert unused(model, plain) == {}
    says(**SAID)
    assert unused(model, plain) == SAID
    # what was asked for is no other
    assert SAID.keys() - unused(model, drawn).keys() == {"do_sample", "temperature"}
    says(do_sample=True, temperature=1.0, top_k=50, pad_token_id=0)
    assert unused(model, plain) == {"do_sample": True}


@pytest.mark.parametrize("drafted", [False, True])
def test_a_text_ends_where_the_model_says(model, says, drafted):
    inputs = encoded(model.tokenizer, model.config, "Ada feeds the owl", chat=False)
    new = model.generate(**inputs, **settings_for(model.tokenizer, NEW))[0, inputs["input_ids"].shape[1] :].tolist()
    assert made(model, drafted=drafted).tokens == NEW
    says(eos_token_id=[256, new[2]])
    assert made(model, drafted=drafted).tokens == new.index(new[2]) + 1
    written = [model.tokenizer.decode([token]) for token in new]
    last = next(each for each in written if each.isascii() and each.isprintable())
    says(stop_strings=[last])
    assert made(model, drafted=drafted).tokens == written.index(last) + 1
