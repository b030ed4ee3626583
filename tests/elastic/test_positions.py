"""What a network reads at once: learnt positions end, rotations are stretched or only get worse."""

import logging

import pytest
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

from flextron_lit.elastic.positions import demand_positions, readable


def llama(**rotation):
    rope = {"rope_theta": 10000.0, **rotation} if rotation else None
    return LlamaConfig(max_position_embeddings=64, rope_parameters=rope)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (GPT2Config(n_positions=48), 48),
        (GPTNeoXConfig(max_position_embeddings=64), 64),
        (llama(), 64),
        (llama(rope_type="linear", factor=2.0), 128),
        (llama(rope_type="dynamic", factor=4.0), 256),
        # their configs say how many there are now
        (llama(rope_type="llama3", **LLAMA3), 64),
        (llama(rope_type="yarn", factor=4.0, original_max_position_embeddings=16), 64),
    ],
)
def test_so_many_tokens_are_read_at_once(config, tokens):
    assert readable(config) == tokens


def test_beyond_learnt_positions_is_refused_and_beyond_rotations_noted_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flextron_lit"), "propagate", True)
    demand_positions(GPT2Config(n_positions=48), 48, "a block", "lower it")
    with pytest.raises(ValueError, match="a block takes 49 positions, but the model has 48; lower it"):
        demand_positions(GPT2Config(n_positions=48), 49, "a block", "lower it")
    demand_positions(llama(rope_type="linear", factor=2.0), 128, "a block", "lower it")
    assert not caplog.records
    for _ in range(2):
        demand_positions(llama(rope_type="linear", factor=2.0), 129, "a block", "lower it")
    (record,) = caplog.records
    assert record.getMessage() == "note: a block takes 129 positions, but the model was made for 128: worse beyond"
