import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from flextron_lit import checkpoint
from flextron_lit.elastic import ElasticBackbone
from tests.conftest import SPACE, make_llama


class Tokenizer:
    """The one method that writing asks of a tokenizer."""

    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def write(folder, backbone, history=()):
    order = [torch.arange(e.block.full).flip(0) for e in backbone.blocks]
    checkpoint.write(folder, backbone, Tokenizer(), order=order, history=history)
    return order


def test_what_is_written_is_read_and_stays_plain_huggingface(tmp_path, backbone, tokens):
    folder = tmp_path / "run" / "flextron"
    order = write(folder, backbone, [{"stage": "ElasticTraining", "steps": 3}])
    read = checkpoint.read(folder)
    assert read.space == backbone.space
    assert all(torch.equal(a, b) for a, b in zip(read.order, order, strict=True))
    assert read.history == [{"stage": "ElasticTraining", "steps": 3}]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain.model.layers[0].mlp).__name__ == "LlamaMLP"
    assert torch.equal(plain(tokens).logits, backbone.model(tokens).logits)


def test_writing_replaces_the_old_one_whole(tmp_path, backbone):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])
    (folder / "leftover").touch()
    write(folder, backbone, [{"steps": 2}])
    assert checkpoint.read(folder).history == [{"steps": 2}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flextron"]
    assert not (folder / "leftover").exists()


def test_a_failed_write_leaves_the_old_one(tmp_path, backbone, monkeypatch):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write(folder, backbone, [{"steps": 2}])
    assert checkpoint.read(folder).history == [{"steps": 1}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flextron"]


@pytest.mark.parametrize("cut_at", [1, 2])
def test_a_replacement_cut_off_between_the_renames_is_recovered(tmp_path, backbone, monkeypatch, cut_at):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])
    done = []

    def rename(source, target):
        if len(done) == cut_at:
            raise KeyboardInterrupt
        done.append(target)
        os.replace(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", rename)
    if cut_at == 1:
        with pytest.raises(KeyboardInterrupt):
            write(folder, backbone, [{"steps": 2}])
        assert not folder.exists()
    else:
        write(folder, backbone, [{"steps": 2}])
    monkeypatch.undo()
    checkpoint.recover(folder)
    assert checkpoint.read(folder).history == [{"steps": cut_at}]


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no Flextron checkpoint: it has no flextron.json"):
        checkpoint.read(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def newer(path):
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"format_version": 99}))


def without_space(path):
    record = json.loads(path.read_text())
    del record["space"]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("flextron.json", cut, "is damaged"),
        ("flextron.json", newer, "has format 99, this program reads up to 1"),
        ("flextron.json", without_space, r"is damaged \(KeyError: 'space'\)"),
        ("order.safetensors", cut, "is damaged"),
        ("order.safetensors", os.remove, "is damaged"),
    ],
)
def test_damage_is_one_clear_error(tmp_path, name, spoil, message):
    folder = tmp_path / "flextron"
    write(folder, ElasticBackbone(make_llama(), SPACE))
    checkpoint.read(folder)
    spoil(folder / name)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(folder)
