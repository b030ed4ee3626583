"""Small Flextron checkpoints, with a history as stages write it."""

import copy

import pytest
import torch

from flextron_lit import checkpoint
from flextron_lit.elastic import ElasticBackbone
from tests.conftest import SPACE, make_llama

RECORD = {
    "stage": "ElasticTraining",
    "steps": 12345,
    "tokens": 6789000,
    "seed": 0,
    "source": "pypi:model==1.0",
    "data": {
        "domains": {"stories": {"source": "[red]/a.txt", "weight": 1.5, "tokens": {"train": 4321, "test": 12}}},
        "tokenizer": "f" * 64,
        "block_size": 512,
    },
    "settings": {"clip_norm": 1.0, "optimizer": {"class": "AdamW", "lr": 0.25}},
    "calibration": {"tokens": 8192},
    "versions": {"torch": "2.13.0"},
    "git_commit": "abc123",
}


class Tokenizer:
    """The one method that writing asks of a tokenizer."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def write_checkpoint(folder, model=None, *, space=SPACE, history=(RECORD,), flipped=True):
    """Write a tiny model, the same Llama unless another is given; its units may stand in their first order."""
    backbone = ElasticBackbone(model or make_llama(), space)
    order = [torch.arange(block.full) for block in backbone.space.blocks]
    if flipped:
        order = [units.flip(0) for units in order]
    checkpoint.write(folder, backbone, Tokenizer(), order=order, history=copy.deepcopy(list(history)))


@pytest.fixture
def written(tmp_path):
    folder = tmp_path / "one"
    write_checkpoint(folder)
    return folder
