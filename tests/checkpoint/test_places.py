"""At the top of a Flextron folder lie weights of the network alone, and folders of format 1 are read as ever."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextron_lit import FlextronModel, checkpoint
from flextron_lit.checkpoint.comparison import compare
from flextron_lit.checkpoint.description import describe
from flextron_lit.checkpoint.location import locate
from flextron_lit.files.whole_folder import files_in
from flextron_lit.routers.trained import TrainedSurrogate
from flextron_lit.sources import load_tokenizer

EARLIER = Path(__file__).parent / "earlier" / "flextron"
"""Of format 1, with everything that a folder may hold."""


@pytest.fixture
def extended(tmp_path):
    checkpoint.extend(EARLIER, tmp_path / "extended", files={"costs/note.json": b"{}"})
    return tmp_path / "extended"


@pytest.fixture
def saved(tmp_path):
    FlextronModel.from_pretrained(EARLIER).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("made", ["written", "extended", "saved"])
def test_a_loader_that_takes_every_file_finds_the_weights_alone(request, made):
    folder = request.getfixturevalue(made)
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == load_file(folder / "model.safetensors").keys()
    assert "elastic/order.safetensors" in files_in(folder)
    assert json.loads((folder / "flextron.json").read_text())["format_version"] == 2
    record = json.loads((folder / "flextron.json").read_text())
    # the tokenizer's may be written anew by who trains with the folder
    assert {*checkpoint.verify(folder), *record.get("unsealed", [])} == set(files_in(folder))


@pytest.mark.parametrize("made", ["extended", "saved"])
def test_what_is_made_of_a_folder_of_format_1_says_the_same(request, made):
    folder = request.getfixturevalue(made)
    before, after = checkpoint.read(EARLIER), checkpoint.read(folder)
    assert all(torch.equal(one, other) for one, other in zip(before.order, after.order, strict=True))
    one, other = (TrainedSurrogate.read(each, before.space) for each in (EARLIER, folder))
    assert one.full_loss == other.full_loss
    assert all(torch.equal(value, other.text[name]) for name, value in one.text.items())
    told = [describe(locate(each))["surrogate"] for each in (EARLIER, folder)]
    assert told == ["surrogate.safetensors", "elastic/surrogate.safetensors"]
    difference = compare(EARLIER, folder)
    assert not difference["order"]
    assert not [line for line in difference["files"] if "surrogate" in line or "order" in line]
    assert not difference["config"]


def test_what_replaces_or_drops_a_file_means_the_moved_one(tmp_path):
    moved = "elastic/surrogate.safetensors"
    checkpoint.extend(EARLIER, tmp_path / "without", files={}, without=(moved,))
    checkpoint.extend(EARLIER, tmp_path / "replaced", files={moved: b"another"})
    assert not [name for name in files_in(tmp_path / "without") if "surrogate" in name]
    assert {name for name in files_in(tmp_path / "replaced") if "surrogate" in name} == {moved}
    assert (tmp_path / "replaced" / moved).read_bytes() == b"another"


def test_what_is_made_of_it_is_in_the_form_that_older_readers_know(extended):
    before = {name: (EARLIER / name).read_bytes() for name in files_in(EARLIER)}
    config, tokenizer = (json.loads((extended / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "local_files_only" not in tokenizer
    one, other = (load_tokenizer(str(each)) for each in (EARLIER, extended))
    assert one("The owl.")["input_ids"] == other("The owl.")["input_ids"]
    # what is linked is not what is rewritten
    assert {name: (EARLIER / name).read_bytes() for name in files_in(EARLIER)} == before
    assert json.loads(before["tokenizer_config.json"])["local_files_only"] is True


def test_extending_a_folder_of_format_1_does_not_hide_damage(tmp_path):
    source = Path(shutil.copytree(EARLIER, tmp_path / "source"))
    path = source / "surrogate.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    checkpoint.extend(source, tmp_path / "two", files={})
    with pytest.raises(ValueError, match=r"elastic/surrogate.safetensors is damaged: its sha256 is"):
        checkpoint.verify(tmp_path / "two")
