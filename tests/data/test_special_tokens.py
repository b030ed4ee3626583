"""A document begins and ends as its tokenizer has it, once, unless that is switched off; where nothing is put around
it, its tokens and their place in the cache are what they always were."""

import json

import pytest

from flextron_lit.data import TextDataModule, TextDomain, batches_of, first_tokens, tokenized
from flextron_lit.data.encoding import Ends, encode
from flextron_lit.losses.cross_entropy import IGNORED
from tests.data.chat import CHATML, chat_domain, tokenizer_with
from tests.data.special import BEGIN, END, with_bos, write_dense

TALES = TextDomain(source="generated:20,0")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))


def ids(text):
    return tokenizer_with(None)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("tokenizer", "ends"),
    [(tokenizer_with(None), Ends()), (with_bos(), Ends((BEGIN,))), (with_bos(ends=True), Ends((BEGIN,), (END,)))],
)
def test_what_stands_around_a_text_is_asked_of_its_tokenizer(tokenizer, ends):
    assert Ends.of(tokenizer) == ends


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("text", ["one", "<s>one", "one<|endoftext|>", "<s>one<|endoftext|>"])
def test_a_document_begins_and_ends_once_whatever_it_spells(text, ends):
    tokenizer = with_bos(ends=ends)
    (made,) = encode([text], tokenizer, Ends.of(tokenizer))
    assert made.ids == [BEGIN, *ids("one"), END]
    # inside, what spells a special token is one
    (inside,) = encode(["one<|endoftext|><s>one"], tokenizer, Ends.of(tokenizer))
    assert inside.ids == [BEGIN, *ids("one"), END, BEGIN, *ids("one"), END]


@pytest.mark.parametrize("text", ["one", "one<|endoftext|>"])
def test_without_a_bos_tokens_are_those_of_before(text):
    tokenizer = tokenizer_with(None)
    before = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]]
    assert [each.ids for each in encode([text], tokenizer, Ends.of(tokenizer))] == before
    # and so are those of a tokenizer that is not asked
    assert [each.ids for each in encode([text], with_bos())] == before


def key(tokenizer, domain=TALES, **settings):
    return tokenized.tokenized("tales", domain, tokenizer, held_out=0.2, seed=0, **settings).key


def test_the_key_changes_where_the_tokens_do(tmp_path):
    assert key(tokenizer_with(None), special_tokens=True) == key(tokenizer_with(None))
    assert (
        len({key(with_bos()), key(with_bos(), special_tokens=True), key(with_bos(ends=True), special_tokens=True)}) == 3
    )
    # a chat template says itself what begins
    talk = chat_domain(tmp_path)
    assert key(with_bos(template=CHATML), talk, special_tokens=True) == key(with_bos(template=CHATML), talk)


def module(folder, **settings):
    sizes = {"block_size": 32, "validation_tokens": 64, "test_tokens": 64}
    data = TextDataModule({"a": TALES}, tokenizer=str(folder), **(sizes | settings))
    data.prepare_data()
    return data


def test_what_is_recorded_is_what_evaluation_reads(tmp_path):
    folder = write_dense(tmp_path / "model")
    for settings, begin in (({}, True), ({"special_tokens": False}, False)):
        data = module(folder, **settings)
        (stream,) = (made.streams["train"] for made in data._tokenized.values())
        assert {int(stream.tokens[start]) == BEGIN for start in stream.starts} == {begin}
        assert int((stream.tokens == BEGIN).sum()) == len(stream.starts) * begin
        block = data.calibration_batches(32)[0]
        assert block["labels"][0, 0] == IGNORED
        described = json.loads(json.dumps(data.describe()))
        again = TextDataModule.from_description(described, tokenizer=str(folder), validation_tokens=64)
        again.prepare_data()
        assert again.describe()["domains"]["a"]["key"] == described["domains"]["a"]["key"]
    # what an older program wrote says nothing, and was made without
    described = module(folder, special_tokens=False).describe()
    del described["special_tokens"]
    old = TextDataModule.from_description(described, tokenizer=str(folder), validation_tokens=64)
    assert old.special_tokens is False


def test_a_text_that_a_command_names_begins_so_too(tmp_path):
    tokenizer, rows = with_bos(ends=False), tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n')
    stream = first_tokens(str(rows), tokenizer, 100, special_tokens=True)
    # the last one is left open: the text may go on
    assert stream.tokens.tolist() == [BEGIN, *ids("one"), END, BEGIN, *ids("two")]
    assert stream.starts.tolist() == [0, 5]
    (batch,) = batches_of(stream, 8)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert first_tokens(str(rows), tokenizer, 100).tokens.tolist() == [*ids("one"), END, *ids("two")]
    # a plain file is what it always was: one document, as it stands
    plain = tmp_path / "plain.txt"
    plain.write_text(" one\n\ntwo\n")
    assert (
        first_tokens(str(plain), tokenizer_with(None), 7, special_tokens=True).tokens.tolist()
        == ids(" one\n\ntwo\n")[:7]
    )
    (batch,) = batches_of(first_tokens(str(plain), tokenizer, 4, special_tokens=True), 4)
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[BEGIN, *ids(" on")]]
