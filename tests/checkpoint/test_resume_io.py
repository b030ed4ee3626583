"""The state of an unfinished run: every bit of it is looked at before anything goes on from it."""

import random

import pytest
import torch

from flextron_lit.checkpoint.resume_io import BLOCKS, StreamedCheckpointIO, check_processes, read_state


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "resume.ckpt"
    content = {"state_dict": {"w": torch.arange(4096.0)}, "random_state": [{}], BLOCKS: 4}
    StreamedCheckpointIO().save_checkpoint(content, path)
    return path


def test_a_bit_that_has_turned_over_is_noticed(state):
    whole, draw = state.read_bytes(), random.Random(0)
    # within the tensor, which is most of the file
    first = whole.find(torch.arange(4096.0).numpy().tobytes())
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[first + draw.randrange(4 * 4096)] ^= 1 << draw.randrange(8)
        state.write_bytes(damaged)
        # the control: torch looks at no digest
        assert not torch.equal(torch.load(state)["state_dict"]["w"], torch.arange(4096.0))
        for read in (read_state, StreamedCheckpointIO().load_checkpoint):
            with pytest.raises(ValueError, match=r"resume.ckpt is damaged .*; start anew with --fresh") as refused:
                read(state)
            assert "\n" not in str(refused.value)
    state.write_bytes(whole)
    assert torch.equal(read_state(state)["state_dict"]["w"], torch.arange(4096.0))
    assert read_state(state, whole=False)["state_dict"]["w"].is_meta


@pytest.mark.parametrize("length", [0, 100, -100])
def test_one_that_is_cut_off_is_noticed(state, length):
    state.write_bytes(state.read_bytes()[:length])
    for whole in (True, False):
        with pytest.raises(ValueError, match=r"resume.ckpt is damaged .*; start anew with --fresh"):
            read_state(state, whole=whole)


def test_one_that_says_something_else_is_noticed(state):
    with pytest.raises(ValueError, match=r"resume.ckpt is damaged \(KeyError: 'random_state'\)"):
        check_processes({BLOCKS: 4}, state, 1, 4)
    check_processes(read_state(state), state, 1, 4)
