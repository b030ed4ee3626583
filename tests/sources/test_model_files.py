"""From the Hub comes what is read or passed on; what a source had beside its weights goes with what is made of it."""

import json
import shutil

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import LlamaTokenizer

from flextron_lit import FlextronModel
from flextron_lit.checkpoint import extend
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.commands.export import command as export
from flextron_lit.files.whole_folder import files_in
from flextron_lit.sources import dense_models, hub, load_dense, load_tokenizer, resolve_model
from flextron_lit.sources.model_files import TERMS, pass_on
from tests.export.families import MAKE, write_checkpoint
from tests.front_door import ROOT

TINY = ROOT / "configs/models/tiny-llama"
NEEDED = {
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "LICENSE",
    "License.txt",
    "NOTICE.md",
    "USE_POLICY.md",
}
FLEXTRON = {"flextron.json", "elastic/order.safetensors", "costs/a.json", "routers/static.json", "order.safetensors"}
NOT_NEEDED = {
    ".gitattributes",
    "README.md",
    "modeling_mine.py",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "original/params.json",
    "original/tokenizer.model",
    "original/model.safetensors",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/config.json",
    "checkpoint-500/chat_template.jinja",
    "runs/events.txt",
    "adapter_model.safetensors",
}
BESIDE = {
    "tokenizer.model": b"pieces",
    "LICENSE": b"terms",
    "NOTICE.txt": b"notice",
    "Licence-old.md": b"terms of before",
    "tool.jinja": b"{{ tools }}",
    "chat_template.jinja": b"{{ messages[0].content }}",
    "additional_chat_templates/tool_use.jinja": b"{{ messages }}",
}


def test_from_the_hub_come_exactly_the_files_that_are_needed(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **how: asked.append(how) or str(tmp_path))
    resolve_model("hub:org/name")
    (how,) = asked
    there = sorted(NEEDED | FLEXTRON | NOT_NEEDED)
    fetched = filter_repo_objects(
        there, allow_patterns=how["allow_patterns"], ignore_patterns=how.get("ignore_patterns")
    )
    assert set(fetched) == NEEDED | FLEXTRON


@pytest.fixture
def source(tmp_path):
    """A dense folder with what its authors put beside the weights."""
    folder = tmp_path / "source"
    load_dense(f"random:{TINY}").save_pretrained(folder)
    shutil.copy(TINY / "tokenizer.json", folder)
    shutil.copy(TINY / "tokenizer_config.json", folder)
    for name, content in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "README.md").write_text("a card")
    return folder


def test_what_the_source_had_goes_along_the_whole_way(source, tmp_path):
    FlextronModel.from_pretrained(source).save_pretrained(tmp_path / "flextron")
    extend(tmp_path / "flextron", tmp_path / "routed", files={"routers/a.json": b"{}"})
    FlextronModel.from_pretrained(tmp_path / "flextron").save_pretrained(tmp_path / "again")
    how = ("--checkpoint", str(tmp_path / "again"), "--device", "cpu", "--budget", "1")
    export([*how, "--output", str(tmp_path / "small")])
    for made in ("flextron", "routed", "again", "small"):
        found = files_in(tmp_path / made)
        assert {name: found[name].read_bytes() for name in BESIDE if name in found} == BESIDE, made
    assert (tmp_path / "small/README.md").read_text() != "a card"
    tokenizer = load_tokenizer(str(tmp_path / "again"))
    assert tokenizer.chat_template.keys() == {"default", "tool_use"}


def test_terms_go_along_with_a_gguf_file_and_the_rest_is_in_it(tmp_path):
    write_checkpoint(tmp_path / "flextron", MAKE["llama"]())
    for name in ("LICENSE", "NOTICE.txt", "Licence-old.md", "tool.jinja"):
        (tmp_path / "flextron" / name).write_bytes(BESIDE[name])
    how = ("--checkpoint", str(tmp_path / "flextron"), "--device", "cpu", "--budget", "1", "--format", "gguf")
    export([*how, "--output", str(tmp_path / "small")])
    names = {"LICENSE", "NOTICE.txt", "Licence-old.md", "README.md", "model.gguf", "sub_network.json"}
    assert files_in(tmp_path / "small").keys() == names


def test_what_was_changed_in_python_is_not_brought_back(source, tmp_path):
    model = FlextronModel.from_pretrained(source)
    model.tokenizer.chat_template = "{{ messages | length }}"
    model.save_pretrained(tmp_path / "flextron")
    assert (tmp_path / "flextron/chat_template.jinja").read_text() == "{{ messages | length }}"
    assert not (tmp_path / "flextron/additional_chat_templates").exists()
    model.tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "flextron")
    assert not (tmp_path / "flextron/chat_template.jinja").exists()


def test_nothing_is_taken_from_where_nothing_was_read(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/LICENSE").write_text("of another project")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "out").mkdir()
    for nowhere in ("", "org/name", tmp_path / "gone"):
        pass_on(nowhere, tmp_path / "out", TERMS)
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": LlamaTokenizer.__name__}))
    monkeypatch.setattr(dense_models, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="cannot load a tokenizer .*not installed: pip install sentencepiece"):
        load_tokenizer(f"random:{tmp_path}")


def test_a_random_network_is_still_what_it_was(source):
    # nothing beside the config and the tokenizer matters to what is computed
    one, other = (load_elastic(f"random:{each}") for each in (source, TINY))
    ids = torch.arange(1, 9)[None]
    assert torch.equal(one.backbone.model(ids).logits, other.backbone.model(ids).logits)
