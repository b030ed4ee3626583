import errno
import json
import os
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flextron_lit import checkpoint
from flextron_lit.checkpoint import writing
from flextron_lit.checkpoint.in_memory import load_elastic, shape_of
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.files.whole_folder import files_in, recover
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


def raising(error):
    def fail(*_):
        raise error

    return fail


def assert_only_the_first_is_there(folder):
    assert checkpoint.read(folder).history == [{"steps": 1}]
    assert checkpoint.verify(folder)
    assert sorted(p.name for p in folder.parent.iterdir()) == ["flextron"]


def test_a_failed_write_leaves_the_old_one(tmp_path, backbone, monkeypatch):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])
    monkeypatch.setattr(writing, "save_file", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        write(folder, backbone, [{"steps": 2}])
    assert_only_the_first_is_there(folder)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        # as safetensors and tokenizers say it
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["system", "quota", "safetensors", "tokenizers"],
)
def test_a_full_disk_is_one_clear_error_and_leaves_the_old_one(tmp_path, backbone, monkeypatch, error):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])
    monkeypatch.setattr(writing, "save_file", raising(error))
    needed = sum(p.numel() for p in backbone.model.parameters()) * 4 / 1e6
    with pytest.raises(ValueError, match=rf"{folder} .*it needs about {needed:.1f} MB .*, but [\d.]+ MB are free"):
        write(folder, backbone, [{"steps": 2}])
    assert_only_the_first_is_there(folder)


def test_a_write_that_the_system_cuts_off_leaves_the_old_one(tmp_path, backbone):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ValueError, match=rf"cannot write {folder} \(File too large\)"):
            write(folder, backbone, [{"steps": 2}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_only_the_first_is_there(folder)
    write(folder, backbone, [{"steps": 2}])
    assert checkpoint.read(folder).history == [{"steps": 2}]


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path, backbone):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match=r"cannot write .*/file/run/flextron \(Not a directory\)"):
        write(file / "run" / "flextron", backbone)
    with pytest.raises(ValueError, match=r"cannot write .*/file: a file of that name exists"):
        write(file, backbone)
    assert file.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_refused_replacement_brings_the_old_one_back(tmp_path, backbone, monkeypatch):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])

    def rename(source, target):
        if source.name.endswith("partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        os.replace(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(ValueError, match="cannot write .*Permission denied"):
        write(folder, backbone, [{"steps": 2}])
    assert_only_the_first_is_there(folder)


def test_whoever_may_read_the_record_may_read_the_weights(tmp_path, backbone):
    write(tmp_path / "flextron", backbone)
    modes = {name: path.stat().st_mode for name, path in files_in(tmp_path / "flextron").items()}
    assert set(modes.values()) == {modes["flextron.json"]}


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

    monkeypatch.setattr(os, "rename", rename)
    if cut_at == 1:
        with pytest.raises(KeyboardInterrupt):
            write(folder, backbone, [{"steps": 2}])
        assert not folder.exists()
    else:
        write(folder, backbone, [{"steps": 2}])
    monkeypatch.undo()
    recover(folder)
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


def with_widths(path, widths):
    record = json.loads(path.read_text())
    record["space"][0]["widths"] = widths
    path.write_text(json.dumps(record))


def empty_widths(path):
    with_widths(path, [])


def falling_widths(path):
    with_widths(path, [4, 2, 4])


def twice_the_same(path):
    order = load_file(path)
    order["layers.0.attention"][0] = order["layers.0.attention"][1]
    save_file(order, path)


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def flip_header(path):
    flip(path, 0)


def flip_last(path):
    flip(path, -1)


def another_seed(path):
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("flextron.json", cut, "is damaged"),
        ("flextron.json", newer, "has format 99, this program reads up to 2"),
        ("flextron.json", without_space, r"is damaged \(KeyError: 'space'\)"),
        ("flextron.json", empty_widths, r"is damaged \(IndexError"),
        ("flextron.json", falling_widths, r"is damaged \(ValueError: the widths of layers.0.attention must ascend"),
        ("elastic/order.safetensors", cut, "order.safetensors is damaged"),
        ("elastic/order.safetensors", os.remove, "it has no elastic/order.safetensors"),
        ("elastic/order.safetensors", twice_the_same, "layers.0.attention is not an order of 4 units"),
        ("model.safetensors", cut, "model.safetensors is damaged"),
        ("model.safetensors", flip_header, "model.safetensors is damaged"),
        ("model.safetensors", os.remove, "it has no model.safetensors"),
        ("config.json", os.remove, "it has no config.json"),
    ],
)
def test_damage_is_one_clear_error(tmp_path, name, spoil, message):
    folder = tmp_path / "flextron"
    write(folder, ElasticBackbone(make_llama(), SPACE))
    checkpoint.read(folder)
    spoil(folder / name)
    with pytest.raises(ValueError, match=message):
        checkpoint.read(folder)


def test_what_was_written_is_verified_whole(tmp_path, backbone):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"seed": 0, "tuple": (1, 2), "layers": {3: 1.5}}])
    assert sorted(checkpoint.verify(folder)) == sorted(files_in(folder))


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("model.safetensors", flip_last, "model.safetensors is damaged: its sha256 is"),
        ("elastic/order.safetensors", flip_last, "order.safetensors is damaged: its sha256 is"),
        ("flextron.json", another_seed, "flextron.json is damaged: its sha256 is"),
        ("tokenizer.json", cut, "tokenizer.json is damaged: its sha256 is"),
        ("tokenizer.json", os.remove, "it has no tokenizer.json"),
    ],
)
def test_a_flipped_bit_is_noticed(tmp_path, backbone, name, spoil, message):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"seed": 0}])
    checkpoint.verify(folder)
    spoil(folder / name)
    with pytest.raises(ValueError, match=message):
        checkpoint.verify(folder)


def test_a_checkpoint_from_before_digests_is_read_and_cannot_be_verified(tmp_path, backbone):
    folder = tmp_path / "flextron"
    write(folder, backbone, [{"steps": 1}])
    record = json.loads((folder / "flextron.json").read_text())
    del record["sha256"]
    (folder / "flextron.json").write_text(json.dumps(record))
    flip_last(folder / "model.safetensors")
    assert checkpoint.verify(folder) == []
    assert checkpoint.read(folder).history == [{"steps": 1}]


def test_weights_in_shards_are_found_and_missed(tmp_path, backbone):
    folder = tmp_path / "flextron"
    write(folder, backbone)
    (folder / "model.safetensors").unlink()
    backbone.model.save_pretrained(folder, max_shard_size="20KB")
    shards = checkpoint.weight_files(folder)
    assert len(shards) > 1
    assert sorted(shards) == sorted(folder.glob("model-*.safetensors"))
    checkpoint.read(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"it has no {shards[1].name}"):
        checkpoint.read(folder)


def test_extending_shares_what_stays_and_adds_what_is_new(tmp_path, backbone):
    write(tmp_path / "one", backbone, [{"stage": "ElasticTraining"}])
    (tmp_path / "table.json").write_text("{}")
    files = {"routers/a.json": b"a", "costs/table.json": tmp_path / "table.json"}
    history = [{"stage": "ElasticTraining"}, {"stage": "Router"}]
    checkpoint.extend(tmp_path / "one", tmp_path / "two", files=files, history=history)
    assert {"routers/a.json", "costs/table.json", "model.safetensors"} <= set(checkpoint.verify(tmp_path / "two"))
    assert checkpoint.read(tmp_path / "two").history == history
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.stat().st_ino == two.stat().st_ino
    # in place, with a file replaced and another left out
    checkpoint.extend(tmp_path / "two", tmp_path / "two", files={"routers/a.json": b"b"}, without=("costs/",))
    assert (tmp_path / "two/routers/a.json").read_bytes() == b"b"
    assert not (tmp_path / "two/costs").exists()
    assert checkpoint.verify(tmp_path / "two")
    assert not (tmp_path / "one/routers").exists()


def test_extending_does_not_hide_damage(tmp_path, backbone):
    write(tmp_path / "one", backbone)
    weights = tmp_path / "one/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    checkpoint.extend(tmp_path / "one", tmp_path / "two", files={"routers/a.json": b"a"})
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        checkpoint.verify(tmp_path / "two")


def test_extending_follows_links_and_changes_no_permission_of_the_source(tmp_path, backbone):
    write(tmp_path / "blobs", backbone)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        path.chmod(0o444)
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    checkpoint.extend(tmp_path / "snapshot", tmp_path / "two", files={})
    assert not any(path.is_symlink() for path in (tmp_path / "two").iterdir())
    assert "model.safetensors" in checkpoint.verify(tmp_path / "two")
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in (tmp_path / "blobs").iterdir())


def test_a_disk_without_hard_links_gets_copies(tmp_path, backbone, monkeypatch):
    write(tmp_path / "one", backbone)

    def refuse(*_):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    checkpoint.extend(tmp_path / "one", tmp_path / "two", files={})
    assert checkpoint.verify(tmp_path / "two")
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_ino != two.stat().st_ino


def test_what_is_read_without_weights_is_compared_without_them(tmp_path, backbone):
    write(tmp_path, backbone)

    def turned_over(name):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))

    turned_over("model.safetensors")
    checkpoint.verify_small(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its sha256"):
        checkpoint.verify(tmp_path)
    turned_over("elastic/order.safetensors")
    with pytest.raises(ValueError, match="order.safetensors is damaged: its sha256"):
        checkpoint.verify_small(tmp_path)
    # what was deleted is missed by whoever reads it
    (tmp_path / "elastic/order.safetensors").unlink()
    checkpoint.verify_small(tmp_path)


def test_a_config_of_other_layers_is_refused_before_they_are_made(tmp_path, backbone):
    write(tmp_path, backbone)
    space = checkpoint.read(tmp_path).space
    assert shape_of(tmp_path, space).space == space
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))
    record = json.loads((tmp_path / "flextron.json").read_text())
    # as of before digests were noted
    del record["sha256"]
    (tmp_path / "flextron.json").write_text(json.dumps(record))
    for read in (lambda: shape_of(tmp_path, space), lambda: load_elastic(str(tmp_path))):
        with pytest.raises(ValueError, match=r"config.json is damaged .*1000000000 layers, the space 3"):
            read()
