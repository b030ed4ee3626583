import collections
import itertools
import json

import numpy as np
import pytest
import torch

from flextron_lit.data import EpochSampler, ResumableLoader, TextDataModule, TextDomain, text_blocks, tokenized
from flextron_lit.data.loader import BlockDataset, mixed_order, shares
from flextron_lit.data.packing import block
from flextron_lit.data.streams import TokenStream
from flextron_lit.data.tokenized import split_documents
from flextron_lit.losses.cross_entropy import cross_entropy
from flextron_lit.sources import load_tokenizer
from tests.conftest import ATTENTION, VOCABULARY, make_llama
from tests.front_door import ROOT
from tests.options import seed

TINY = f"random:{ROOT / 'configs/models/tiny-llama'}"
DOMAINS = {"a": TextDomain(source="generated:60,0"), "b": TextDomain(source="generated:30,1", weight=2)}
SMALL = {"tokenizer": TINY, "block_size": 32, "batch_size": 2, "validation_tokens": 96, "test_tokens": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def module(**settings):
    data = TextDataModule(DOMAINS, **(SMALL | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def stream(*lengths):
    tokens = torch.randint(1, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(seed(0))).numpy()
    return TokenStream(tokens.astype(np.uint16), np.cumsum([0, *lengths[:-1]]))


# --- packing ----------------------------------------------------------------------------------------------------


def test_positions_restart_and_the_crossing_label_is_masked():
    made = block(stream(3, 4, 9), 0, 8)
    assert made["position_ids"].tolist() == [0, 1, 2, 0, 1, 2, 3, 0]
    assert (made["labels"] == -100).nonzero().flatten().tolist() == [0, 3, 7]
    following = block(stream(3, 4, 9), 1, 8)
    assert following["position_ids"].tolist() == list(range(8))
    assert torch.equal(following["labels"][1:], following["input_ids"][1:])


@pytest.mark.parametrize("attention", ATTENTION)
def test_packed_loss_equals_that_of_separate_documents(attention):
    model = make_llama(attention)
    text = stream(7, 12, 5, 30, 10)
    blocks = [block(text, i, 32) for i in range(2)]
    batch = {key: torch.stack([b[key] for b in blocks]) for key in blocks[0]}
    with torch.no_grad():
        packed = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        crossing = model(batch["input_ids"], use_cache=False).logits
        total, tokens = cross_entropy(packed, batch["labels"])
        pieces = [batch["input_ids"][0, s] for s in (slice(0, 7), slice(7, 19), slice(19, 24), slice(24, 32))]
        pieces += [batch["input_ids"][1, s] for s in (slice(0, 22), slice(22, 32))]
        separate = [cross_entropy(model(p[None]).logits, p[None]) for p in pieces]
    assert tokens == sum(count for _, count in separate) == 64 - len(pieces)
    torch.testing.assert_close(total, sum(loss for loss, _ in separate), rtol=1e-5, atol=1e-5)
    assert (cross_entropy(crossing, batch["labels"])[0] - total).abs() > 0.1


def test_text_blocks_are_plain_and_contiguous(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 3)
    tokenizer = load_tokenizer(TINY)
    blocks = text_blocks(path, tokenizer, block_size=8, tokens=20)
    assert tokenizer.decode(blocks.flatten()) == "abcdefghijabcdef"
    with pytest.raises(ValueError, match="has 30 tokens, fewer than the 40"):
        text_blocks(path, tokenizer, block_size=8, tokens=40)
    with pytest.raises(ValueError, match="7 tokens make no block of 8"):
        text_blocks(path, tokenizer, block_size=8, tokens=7)


# --- tokenised once ---------------------------------------------------------------------------------------------


def test_documents_are_split_without_overlap():
    splits = split_documents(50, 0.2, 0)
    assert {k: len(v) for k, v in splits.items()} == {"validation": 5, "test": 5, "train": 40}
    assert sorted(index for part in splits.values() for index in part) == list(range(50))
    assert splits == split_documents(50, 0.2, 0)
    assert splits != split_documents(50, 0.2, 1)
    assert [len(v) for v in split_documents(3, 0.1, 0).values()] == [1, 1, 1]
    with pytest.raises(ValueError, match="2 documents are too few"):
        split_documents(2, 0.1, 0)


def test_streams_hold_the_documents_and_nothing_else():
    data = module()
    tokenizer = load_tokenizer(TINY)
    texts = list(tokenized.documents(DOMAINS["a"]))
    found = []
    for text in data._tokenized["a"].streams.values():
        pieces = np.split(text.tokens, text.starts[1:])
        assert all(piece[-1] == tokenizer.eos_token_id for piece in pieces)
        found += [tokenizer.decode(piece[:-1]) for piece in pieces]
    assert sorted(found) == sorted(texts)


def test_the_record_beside_the_tokens_says_what_they_are(cache):
    data = module()
    tokenizer = load_tokenizer(TINY)
    record = json.loads((cache / "tokens" / data._tokenized["a"].key / "tokens.json").read_text())
    described = data.describe()["domains"]["a"]
    for split, counts in record["counts"].items():
        assert counts == {kind: described[kind][split] for kind in ("documents", "tokens")}
    assert record["vocab_size"] == len(tokenizer) == 257
    assert record["eos_token_id"] == tokenizer.eos_token_id
    assert record["dtype"] == "uint16"


def test_tokens_are_made_once_and_again_when_anything_changes(monkeypatch, cache):
    made = []
    original = tokenized._write
    monkeypatch.setattr(tokenized, "_write", lambda *args: made.append(1) or original(*args))
    module()
    assert len(made) == 2
    module(block_size=16)
    assert len(made) == 2
    module(held_out=0.2)
    assert len(made) == 4


@pytest.mark.parametrize("name", ["train.tokens", "validation.starts", "tokens.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_damage_in_the_cache_is_mended(cache, name, damage):
    key = module()._tokenized["a"].key
    path = cache / "tokens" / key / name
    content = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-7])
    else:
        path.write_bytes(content[:5] + bytes([content[5] ^ 64]) + content[6:])
    module()
    assert path.read_bytes() == content


# --- order and resumption ---------------------------------------------------------------------------------------


def test_shares_add_up():
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert shares(7, [1, 2.5]) == [2, 5]
    assert shares(0, [1, 2]) == [0, 0]


def test_an_epoch_mixes_by_weight_and_goes_on_in_the_next():
    sizes, weights = [6, 18], [1, 1]
    epochs = [mixed_order(sizes, weights, epoch=e, seed=0) for e in range(3)]
    for order in epochs:
        counts = collections.Counter(i < 6 for i in order)
        assert counts == {True: 12, False: 12}
    small = [collections.Counter(i for i in order if i < 6) for order in epochs]
    assert all(set(c.values()) == {2} for c in small)
    large = [i for order in epochs for i in order if i >= 6]
    assert set(collections.Counter(large).values()) == {2}
    assert epochs[0] == mixed_order(sizes, weights, epoch=0, seed=0)
    assert epochs[0] != epochs[1]
    assert epochs[0] != mixed_order(sizes, weights, epoch=0, seed=1)


def test_ranks_share_an_epoch_without_overlap():
    samplers = [EpochSampler([7, 6], [1, 1], seed=0, rank=r, world=2) for r in range(2)]
    parts = [list(s) for s in samplers]
    assert [len(p) for p in parts] == [6, 6]
    whole = list(EpochSampler([7, 6], [1, 1], seed=0, rank=0, world=1))
    assert parts[0] == whole[0:12:2]
    assert parts[1] == whole[1:12:2]


def loader(workers=0):
    dataset = BlockDataset([stream(100, 60), stream(90)], 8)
    sampler = EpochSampler(dataset.sizes, [1, 1], seed=0, rank=0, world=1)
    return ResumableLoader(dataset, sampler=sampler, batch_size=3, num_workers=workers)


def ids(batches):
    return [b["input_ids"].flatten().tolist() for b in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 4, 10])
def test_a_loader_goes_on_where_it_stopped(stop, workers):
    whole = loader()
    epochs = []
    for epoch in range(2):
        whole.sampler.set_epoch(epoch)
        epochs.append(ids(whole))
    first = loader(workers)
    iterator = iter(first)
    seen = ids([next(iterator) for _ in range(stop)])
    assert seen == epochs[0][:stop]
    resumed = loader(workers)
    resumed.load_state_dict(first.state_dict())
    assert ids(resumed) == epochs[0][stop:]
    resumed.sampler.set_epoch(1)
    assert ids(resumed) == epochs[1] != epochs[0]


def test_an_epoch_left_early_does_not_move_the_next_ones_start():
    whole, cut_short = loader(), loader()
    for epoch in range(3):
        for each in (whole, cut_short):
            each.sampler.set_epoch(epoch)
        # what Lightning saves between the epochs
        assert cut_short.state_dict() == {"batches": 0, "epoch": epoch}
        iterator = iter(cut_short)
        assert ids([next(iterator) for _ in range(4)]) == ids(whole)[:4]
        assert cut_short.state_dict() == {"batches": 4, "epoch": epoch}


def test_a_plain_restart_would_repeat_batches():
    first = loader()
    iterator = iter(first)
    next(iterator)
    assert ids(loader())[0] != ids([next(iterator)])[0]


# --- the datamodule ---------------------------------------------------------------------------------------------


def test_loaders_of_the_datamodule():
    data = module()
    assert data.domain_names == ["a", "b"]
    assert [sum(len(b["input_ids"]) for b in x) for x in data.val_dataloader()] == [3, 3]
    assert [sum(len(b["input_ids"]) for b in x) for x in data.test_dataloader()] == [2, 2]
    batch = next(iter(data.train_dataloader()))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), ((2, 32), torch.int64)
    )
    described = data.describe()["domains"]["b"]
    assert described["weight"] == 2
    assert described["documents"] == {"train": 26, "validation": 2, "test": 2}


def rows(batches):
    return [row.tolist() for batch in batches for row in batch["input_ids"]]


def test_ranks_validate_different_blocks(monkeypatch):
    data = module()
    whole = [rows(x) for x in data.val_dataloader()]
    parts = []
    for rank in range(2):
        monkeypatch.setattr(data, "_rank_and_world", lambda rank=rank: (rank, 2))
        parts.append([rows(x) for x in data.val_dataloader()])
    assert [w[0::2] for w in whole] == parts[0]
    assert [w[1::2] for w in whole] == parts[1]


def test_ranks_beyond_the_blocks_get_nothing_in_their_turn(monkeypatch):
    data = module(validation_tokens=SMALL["block_size"], test_tokens=SMALL["block_size"])
    whole = [rows(x) for x in data.val_dataloader()]
    for rank in range(3):
        monkeypatch.setattr(data, "_rank_and_world", lambda rank=rank: (rank, 3))
        for loaders in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
            # a batch each: where a rank had none, the others would wait for it
            assert [len(loader) for loader in loaders] == [1] * len(DOMAINS)
        if rank:
            assert [list(loader) for loader in data.val_dataloader()] == [[None]] * len(DOMAINS)
        else:
            assert [rows(x) for x in data.val_dataloader()] == whole


def test_calibration_is_training_text_mixed_by_weight():
    data = module()
    batches = data.calibration_batches(32 * 12)
    assert sum(len(b["input_ids"]) for b in batches) == 12
    train = {tuple(b["input_ids"].tolist()): i for i, b in enumerate(data._dataset("train", ["a", "b"]))}
    of_a = data._dataset("train", ["a"]).sizes[0]
    drawn = [train[tuple(row.tolist())] < of_a for b in batches for row in b["input_ids"]]
    assert sum(drawn) == 4
    found = [train[tuple(row.tolist())] for b in batches for row in b["input_ids"]]
    spread = data._dataset("train", ["a", "b"]).sizes[1] // 8
    assert all(0 <= later - earlier - spread <= 1 for earlier, later in itertools.pairwise(found[4:]))
    assert [len(b["input_ids"]) for b in data.calibration_batches(1)] == [1]
    only = data.calibration_batches(64, ["b"])
    assert all(train[tuple(row.tolist())] >= of_a for b in only for row in b["input_ids"])
    assert only[0]["labels"].shape == (2, 32)


@pytest.mark.parametrize(
    ("settings", "action", "message"),
    [
        (
            {},
            lambda d: d.calibration_batches(10**9),
            "calibration on 1000000000 tokens needs .* blocks of domain a; it has",
        ),
        ({}, lambda d: d.calibration_batches(0), "calibration needs 1 token or more, not 0"),
        (
            {"block_size": 20000},
            lambda d: d.train_dataloader(),
            r"domain b has \d+ train tokens, .* one block of 20000",
        ),
        ({"block_size": 4096}, lambda d: d.val_dataloader(), r"domain a has \d+ validation tokens"),
        ({}, lambda d: d.calibration_batches(32, ["c"]), "no domain 'c'; there are a, b"),
        ({"validation_tokens": 10**6}, lambda d: d.val_dataloader(), "validation_tokens 1000000 makes 31250 blocks"),
        ({"test_tokens": 8}, lambda d: d.test_dataloader(), "test_tokens 8 makes 0 blocks of 32; domain a has"),
        ({"batch_size": 10**5}, lambda d: d.train_dataloader(), "fewer than the 100000 of one step"),
    ],
)
def test_too_little_text_is_refused_with_both_numbers(settings, action, message):
    data = module(**settings)
    with pytest.raises(ValueError, match=message):
        action(data)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"domains": {}}, "names no domain"),
        ({"block_size": 1}, "block_size must be 2 or more"),
        ({"held_out": 1.0}, "held_out is a share between 0 and 1"),
    ],
)
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(**({"domains": DOMAINS} | SMALL | settings))
