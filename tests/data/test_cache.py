import json
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from flextron_lit.data import TextDomain, tokenized
from flextron_lit.data.encoding import Encoded, encode, tokenizer_fingerprint
from flextron_lit.data.streams import append, open_streams
from tests.data.chat import CHATML, chat_domain, tokenizer_with
from tests.front_door import ENVIRONMENT, ROOT

SCRIPT = ROOT / "tests/data/cache_process.py"
TALES = TextDomain(source="generated:60,0")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(cache, *arguments):
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env=ENVIRONMENT | {"FLEXTRON_CACHE": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(output)


def make(domain=TALES, **settings):
    defaults = {"held_out": 0.1, "seed": 0}
    return tokenized.tokenized("tales", domain, tokenizer_with(CHATML), **(defaults | settings))


def as_lists(made):
    parts = {split: (stream.tokens, stream.starts, stream.predicted) for split, stream in made.streams.items()}
    return {split: [None if part is None else part.tolist() for part in group] for split, group in parts.items()}


# --- several processes, and a killed one ------------------------------------------------------------------------


def test_two_processes_at_once_tokenise_once_and_read_the_same(cache, tmp_path):
    one, other = (finished(p) for p in [start(cache, "beside", tmp_path, rank) for rank in range(2)])
    assert one["together"] == other["together"]
    # two settings of one text are two entries
    assert one["alone"] != other["alone"]
    made = Counter((tmp_path / "log").read_text().split())
    assert sorted(made.values()) == [1, 1, 1]
    assert f"{make().key}.partial" in made
    assert not list((cache / "tokens").glob("*.partial"))


@pytest.mark.parametrize("batches", [1, 7])
def test_what_a_killed_process_leaves_is_not_taken_for_complete(cache, tmp_path, monkeypatch, batches):
    process = start(cache, "killed", batches)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    (left,) = (path for path in (cache / "tokens").iterdir() if path.is_dir())
    assert left.name.endswith(".partial")
    assert (left / "train.tokens").stat().st_size > 1000
    key = left.name.removesuffix(".partial")
    resumed = make()
    assert resumed.key == key
    assert sorted(path.name for path in (cache / "tokens").iterdir()) == [key, f"{key}.lock"]
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "untouched"))
    assert as_lists(resumed) == as_lists(make()) != as_lists(make(seed=1))


# --- damage -----------------------------------------------------------------------------------------------------


def test_every_truncation_and_every_flipped_bit_is_noticed(cache, tmp_path):
    tokenizer = tokenizer_with(CHATML)
    folder = cache / "tokens" / make(chat_domain(tmp_path)).key
    assert sorted(p.name.split(".")[1] for p in folder.iterdir()) == sorted(
        ["json", *["predicted", "starts", "tokens"] * 3]
    )
    unnoticed = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        assert open_streams(folder, tokenizer) is not None
        for i in range(0, len(content), 3):
            flipped = content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :]
            for damaged in (content[:i], flipped):
                path.write_bytes(damaged)
                noticed = open_streams(folder, tokenizer) is None
                # a blank for a blank between the values of the record is no damage
                if not (noticed or damaged.split() == content.split()):
                    unnoticed.append((path.name, i, damaged))
        path.write_bytes(content)
    assert not unnoticed


@pytest.mark.parametrize("kind", ["tokens", "starts", "predicted"])
def test_damage_is_mended(cache, tmp_path, kind):
    domain = chat_domain(tmp_path)
    made = make(domain)
    whole = as_lists(made)
    path = cache / "tokens" / made.key / f"train.{kind}"
    content = path.read_bytes()
    for damaged in (content[:-1], b"", content[:-1] + bytes([content[-1] ^ 1]), None):
        if damaged is None:
            path.unlink()
        else:
            path.write_bytes(damaged)
        assert as_lists(make(domain)) == whole
        assert path.read_bytes() == content


# --- batch by batch ---------------------------------------------------------------------------------------------


def test_streams_are_the_same_whatever_the_batches(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(tokenized, "encode", lambda batch, *how: sizes.append(len(batch)) or encode(batch, *how))
    found = []
    for documents, characters in ((256, 2**20), (7, 2**20), (256, 3000), (1, 1)):
        monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / f"{documents}-{characters}"))
        monkeypatch.setattr(tokenized, "BATCH_DOCUMENTS", documents)
        monkeypatch.setattr(tokenized, "BATCH_CHARACTERS", characters)
        sizes.clear()
        for domain in (TALES, chat_domain(tmp_path)):
            found.append(as_lists(make(domain)))
        assert sum(sizes) == 65
        assert max(sizes) <= documents
        assert (max(sizes) < 60) == (documents < 60 or characters < 10_000)
    assert found[0::2] == [found[0]] * 4
    assert found[1::2] == [found[1]] * 4
    assert found[0] != found[1]


def test_a_batch_ends_at_so_many_documents_or_characters(monkeypatch):
    monkeypatch.setattr(tokenized, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(tokenized, "BATCH_CHARACTERS", 10)
    texts = ["a", "b", "c", "d", "e" * 9, "f" * 30, "g", "h"]
    assert [len(batch) for batch in tokenized._batches(texts)] == [3, 2, 1, 2]
    assert list(tokenized._batches([])) == []


def test_progress_is_shown_by_document(monkeypatch):
    seen = []
    monkeypatch.setattr(
        tokenized, "progress", lambda items, description: seen.append((len(items), description)) or items
    )
    make()
    assert seen == [(60, "tokenising tales")]
    make()
    assert len(seen) == 1


def test_a_source_that_grows_while_it_is_tokenised_leaves_nothing(cache, tmp_path, monkeypatch):
    domain = chat_domain(tmp_path)
    read = tokenized.documents

    def read_and_grow(domain):
        found = read(domain)
        with (tmp_path / "chat.jsonl").open("a") as file:
            file.write((tmp_path / "chat.jsonl").read_text().splitlines()[0] + "\n")
        return found

    monkeypatch.setattr(tokenized, "documents", read_and_grow)
    with pytest.raises(ValueError, match="chat.jsonl changed while it was read"):
        make(domain)
    assert not [path for path in (cache / "tokens").iterdir() if path.is_dir()]


def test_documents_are_appended_behind_those_on_disk(tmp_path):
    dtype = np.dtype(np.uint32)
    append(tmp_path, "train", [Encoded([1, 2, 3], [True, False, True]), Encoded([4], [False])], dtype)
    append(tmp_path, "train", [Encoded([2**20, 6], [False, True])], dtype)
    assert np.fromfile(tmp_path / "train.tokens", dtype).tolist() == [1, 2, 3, 4, 2**20, 6]
    assert np.fromfile(tmp_path / "train.starts", np.int64).tolist() == [0, 3, 4]
    assert np.fromfile(tmp_path / "train.predicted", np.bool_).tolist() == [True, False, True, False, False, True]


# --- the tokenizer ----------------------------------------------------------------------------------------------


def test_limits_that_a_tokenizer_was_saved_with_cut_and_pad_nothing():
    plain, limited = tokenizer_with(None), tokenizer_with(None)
    limited.backend_tokenizer.enable_truncation(5)
    limited.backend_tokenizer.enable_padding(length=9)
    before = tokenizer_fingerprint(limited)
    assert encode(["a longer text"], limited) == encode(["a longer text"], plain)
    assert tokenizer_fingerprint(limited) == before == tokenizer_fingerprint(plain)
    plain.add_tokens("longer")
    assert tokenizer_fingerprint(plain) != before
    assert encode(["a longer text"], limited) != encode(["a longer text"], plain)


def test_batches_are_encoded_as_the_tokenizer_itself_does():
    tokenizer = tokenizer_with(None)
    texts = ["héllo", "", "two <|endoftext|> one"]
    expected = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert [encoded.ids for encoded in encode(texts, tokenizer)] == [[*ids, tokenizer.eos_token_id] for ids in expected]
