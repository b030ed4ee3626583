"""A prompt begins as texts of the network do, once, and ends open; what it cannot read is refused."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
from transformers import GPT2Config, LlamaConfig

from flextron_lit.checkpoint import FlextronCheckpoint
from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.generation.prompt import NEW_TOKENS, encoded, prompt_of, room
from tests.data.chat import CHATML, tokenizer_with
from tests.data.special import BEGIN, END, with_bos

CONFIG = LlamaConfig(vocab_size=258)


def ids(tokenizer, prompt, **how):
    read = encoded(tokenizer, CONFIG, prompt, **({"chat": False} | how))
    assert read["attention_mask"].shape == read["input_ids"].shape
    return read["input_ids"][0].tolist()


@pytest.mark.parametrize("ends", [False, True])
def test_a_prompt_begins_once_and_ends_open(ends):
    tokenizer, word = with_bos(ends=ends), tokenizer_with(None)("one")["input_ids"]
    assert ids(tokenizer, "one") == ids(tokenizer, "<s>one") == [BEGIN, *word]
    assert ids(tokenizer, "one<|endoftext|>") == [BEGIN, *word, END]


def test_it_begins_with_nothing_where_texts_did():
    word = tokenizer_with(None)("one")["input_ids"]
    assert ids(with_bos(), "one", special_tokens=False) == word
    assert ids(tokenizer_with(None), "one") == word


@pytest.mark.parametrize(
    ("text", "begins"),
    # one that does not say goes on as Hugging Face reads a prompt
    [(None, True), ({"block_size": 32}, True), ({"special_tokens": True}, True), ({"special_tokens": False}, False)],
)
def test_the_checkpoint_says_whether_prompts_begin_so(text, begins):
    loaded = Loaded(None, None, FlextronCheckpoint(None, [], [{"data": text}]), None)
    assert loaded.prompts_begin is begins
    assert loaded.special_tokens is bool(text and text.get("special_tokens"))


def test_a_chat_template_says_itself_what_begins():
    template = "{{ bos_token }}" + CHATML
    for special_tokens in (False, True):
        made = ids(with_bos(template=template), "one", chat=True, special_tokens=special_tokens)
        assert made.count(BEGIN) == 1
        assert made[0] == BEGIN


def test_a_token_that_the_network_does_not_know_is_refused():
    with pytest.raises(ValueError, match="the prompt holds '<s>', token 257, but the network knows 257; take the tok"):
        encoded(with_bos(), LlamaConfig(vocab_size=257), "one", chat=False)


def test_a_file_is_read_as_texts_are(tmp_path, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert prompt_of(None, path) == "one\ntwo"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(path.read_bytes())))
    assert prompt_of("-", None) == "one\ntwo"
    path.write_bytes("one".encode("utf-16"))
    with pytest.raises(ValueError, match="prompt.txt is not UTF-8 text: it is UTF-16; save it as UTF-8"):
        prompt_of(None, path)


def test_learnt_positions_have_an_end():
    config = GPT2Config(n_positions=48)
    assert room(40, config, None) == 8
    with pytest.raises(ValueError, match="the prompt has 48 tokens, but the network reads 48 at once"):
        room(48, config, None)
    with pytest.raises(ValueError, match="asks for 9 more, but the network reads 48 at once; ask for 8"):
        room(40, config, 9)


def test_beyond_rotary_positions_there_is_a_note(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flextron_lit"), "propagate", True)
    config = LlamaConfig(max_position_embeddings=48)
    assert room(40, config, None) == 8
    assert room(40, config, 8) == 8
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert room(60, LlamaConfig(max_position_embeddings=48, rope_parameters=scaled), 36) == 36
    assert not caplog.records
    assert room(40, config, 9) == 9
    assert room(48, config, None) == NEW_TOKENS
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "note: prompt plus answer takes 49 positions, but the model was made for 48: worse beyond"
    assert len(said) == 2
