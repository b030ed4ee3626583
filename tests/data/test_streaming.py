"""Text that is tokenised while it is read: every document once a round, whoever reads it and wherever it stops."""

import bz2
import gzip
import json
import lzma
import multiprocessing
import random
from dataclasses import replace

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from pyarrow import parquet

from flextron_lit.data import TextDataModule, TextDomain, lane_loader
from flextron_lit.data.corpus import LEAST_BYTES
from flextron_lit.data.lanes import split_of
from flextron_lit.data.on_the_fly import Streaming
from flextron_lit.data.texts import documents
from flextron_lit.losses.cross_entropy import IGNORED
from flextron_lit.sources import load_tokenizer
from tests.conftest import make_llama
from tests.data.chat import CHATML, turns
from tests.data.special import BEGIN, with_bos
from tests.front_door import ROOT
from tests.options import seed

TINY = f"random:{ROOT / 'configs/models/tiny-llama'}"
LANES, BLOCK, EPOCH = 4, 32, 10**6
STREAMING = Streaming(lanes=LANES, window=8, epoch_tokens=BLOCK * EPOCH)
SMALL = {"tokenizer": TINY, "block_size": BLOCK, "batch_size": 2, "validation_tokens": 64, "test_tokens": 64}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def texts(count, of=""):
    """Documents that can be told apart, short ones and long ones."""
    draw = random.Random(seed(0))
    return [f"{of}{number}:" + "abcdefgh"[: draw.randint(1, 8)] * draw.randint(1, 12) for number in range(count)]


def rows(path, found):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return path


def data_of(streaming=STREAMING, settings=None, **domains):
    for name, each in domains.items():
        domains[name] = each if isinstance(each, TextDomain) else TextDomain(source=str(each))
    data = TextDataModule(domains, **(SMALL | (settings or {})), streaming=streaming)
    data.prepare_data()
    return data


class Group:
    """The loaders of all ranks in one process, which go on from a state, if there is one."""

    def __init__(self, data, world, monkeypatch, *, workers=0, state=None):
        self.loaders = []
        monkeypatch.setattr(data, "num_workers", workers)
        for rank in range(world):
            monkeypatch.setattr(data, "_rank_and_world", lambda rank=rank: (rank, world))
            self.loaders.append(data.train_dataloader())
        monkeypatch.setattr(lane_loader, "gather", lambda _, __: [each._states for each in self.loaders])
        for each in self.loaders if state is not None else ():
            each.load_state_dict(state)
        self.iterators = [iter(each) for each in self.loaders]

    def steps(self, count):
        """The blocks of so many batches of every rank, in the order of all."""
        found = []
        for _ in range(count):
            batches = [next(each)["input_ids"].tolist() for each in self.iterators]
            found += [row for turn in zip(*batches, strict=True) for row in turn]
        return found

    def state(self):
        states = [each.state_dict() for each in self.loaders]
        assert all(state == states[0] for state in states)
        return states[0]


def lanes_of(blocks, tokenizer):
    """The documents that every lane has given whole, in its order."""
    streams = [[token for row in blocks[lane::LANES] for token in row] for lane in range(LANES)]
    return [tokenizer.decode(stream).split(tokenizer.eos_token)[:-1] for stream in streams]


def training(found):
    return [text for text in found if split_of(text, 0.1, 0) == "train"]


def assert_each_once(data, blocks, tokenizer, name, *, rounds=2):
    """Every training document once in every round: not one is missing, and none is there twice."""
    reading = data._on_the_fly.readings[name]
    given = lanes_of(blocks, tokenizer)
    for number in range(rounds):
        dealt = reading.corpus.dealt(LANES, f"0/{name}/{number}")
        whole = []
        for lane, parts in enumerate(dealt):
            own = training(text for part in parts for _, text in part.documents(reading.corpus.domain))
            assert len(given[lane]) >= len(own), "the test reads too few blocks"
            its, given[lane] = given[lane][: len(own)], given[lane][len(own) :]
            assert sorted(its) == sorted(own)
            whole += its
        assert sorted(whole) == sorted(training(documents(reading.corpus.domain)))


def blocks_for(data, name, rounds=2):
    """Blocks in which every lane has come round so often."""
    reading = data._on_the_fly.readings[name]
    most = 0
    for lane in range(LANES):
        parts = (part for number in range(rounds) for part in reading.corpus.dealt(LANES, f"0/{name}/{number}")[lane])
        own = (len(text) + 1 for part in parts for _, text in part.documents(reading.corpus.domain))
        most = max(most, sum(own) // BLOCK + 2)
    return most * LANES


# --- the order, and going on in it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every kind that rows come in."""
    path = tmp_path_factory.mktemp("corpus")
    rows(path / "a.jsonl", texts(150, "a"))
    parquet.write_table(pyarrow.table({"text": texts(90, "b")}), path / "b.parquet", row_group_size=20)
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    for name, compress in packed.items():
        (path / f"{name}.jsonl.{name}").write_bytes(compress(rows(path / "x", texts(40, name)).read_bytes()))
    with pyarrow.output_stream(path / "z.jsonl.zst", compression="zstd") as file:
        file.write((path / "x").read_bytes())
    (path / "x").unlink()
    return path


@pytest.fixture(scope="module")
def data(folder):
    return data_of(mixed=folder)


@pytest.fixture(scope="module")
def straight(data):
    """The blocks of a run that nothing interrupts, for two rounds of every lane."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Group(data, 1, monkeypatch).steps(blocks_for(data, "mixed") // 2)


def test_every_document_comes_once_a_round_in_another_order_each(data, straight, tokenizer):
    assert_each_once(data, straight, tokenizer, "mixed")
    orders = [data._on_the_fly.readings["mixed"].corpus.dealt(LANES, f"0/mixed/{number}") for number in range(2)]
    assert [part.name for part in orders[0][0]] != [part.name for part in orders[1][0]]
    first = training(text for part in orders[0][0] for _, text in part.documents(data.domains["mixed"]))
    assert lanes_of(straight, tokenizer)[0][: len(first)] != first


def test_a_lost_or_doubled_document_would_show(data, straight, tokenizer):
    lost = straight[:8] + straight[8 + LANES :]
    doubled = straight[: 8 + LANES] + straight[8:]
    for wrong in (lost, doubled):
        with pytest.raises(AssertionError):
            assert_each_once(data, wrong, tokenizer, "mixed")


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 2)])
def test_ranks_and_workers_share_the_same_order(data, straight, monkeypatch, world, workers):
    group = Group(data, world, monkeypatch, workers=workers)
    assert group.steps(12) == straight[: 24 * world]
    assert group.state()["blocks"] == 24 * world


@pytest.mark.parametrize("draw", range(3))
def test_killed_at_random_and_resumed_on_other_ranks_nothing_is_lost_or_twice(data, straight, monkeypatch, draw):
    random_ = random.Random(seed(draw))
    blocks, state = [], None
    for world in (2, 1, 2, 4, 1):
        group = Group(data, world, monkeypatch, state=state)
        left = (len(straight) - len(blocks)) // (2 * world)
        kept = random_.randint(1, left // 2)
        blocks += group.steps(kept)
        state = group.state()
        # what is done behind a saved state is lost with the process
        group.steps(random_.randint(0, 2))
    blocks += Group(data, 1, monkeypatch, state=state).steps((len(straight) - len(blocks)) // 2)
    assert blocks == straight[: len(blocks)]
    assert len(blocks) > len(straight) - 8
    # the control: of a rank that knows its own lanes alone, others would begin anew
    group = Group(data, 2, monkeypatch)
    group.steps(20)
    monkeypatch.setattr(lane_loader, "gather", lambda value, _: [value])
    own = group.loaders[0].state_dict()
    assert Group(data, 1, monkeypatch, state=own).steps(4) != straight[80:88]


def test_workers_resume_within_a_window_and_a_document(data, straight, monkeypatch):
    group = Group(data, 1, monkeypatch, workers=2)
    group.steps(7)
    state = group.state()
    assert Group(data, 1, monkeypatch, state=state).steps(5) == straight[14:24]
    assert Group(data, 1, monkeypatch, workers=2, state=state).steps(5) == straight[14:24]


def test_epochs_end_where_they_are_said_to_and_the_text_goes_on(folder, monkeypatch, straight):
    data = data_of(replace(STREAMING, epoch_tokens=6 * BLOCK), mixed=folder)
    loader = data.train_dataloader()
    assert len(loader) == 3
    found = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        found += [row for batch in loader for row in batch["input_ids"].tolist()]
    assert found == straight[:12]
    # as Lightning resumes: within an epoch, or behind the last batch of one
    for stop in (1, 3):
        first = data.train_dataloader()
        iterator = iter(first)
        found = [row for _ in range(stop) for row in next(iterator)["input_ids"].tolist()]
        resumed = data.train_dataloader()
        resumed.load_state_dict(first.state_dict())
        resumed.sampler.set_epoch(0 if stop < 3 else 1)
        found += [row for batch in resumed for row in batch["input_ids"].tolist()]
        assert found == straight[: 6 if stop < 3 else 12]


def test_global_random_numbers_are_left_alone(data, monkeypatch):
    before = torch.get_rng_state()
    Group(data, 1, monkeypatch).steps(2)
    assert torch.equal(torch.get_rng_state(), before)


# --- what is read -----------------------------------------------------------------------------------------------


def first_round(data, name):
    corpus = data._on_the_fly.readings[name].corpus
    return [text for part in corpus.parts for _, text in part.documents(corpus.domain)]


def test_stretches_of_a_long_file_hold_its_rows(tmp_path):
    found = texts(4000)
    data = data_of(a=rows(tmp_path / "a.jsonl", found))
    corpus = data._on_the_fly.readings["a"].corpus
    assert len(corpus.parts) > LANES
    assert max(part.size for part in corpus.parts) <= LEAST_BYTES
    assert sorted(first_round(data, "a")) == sorted(found)


@pytest.mark.parametrize("packed", [False, True])
def test_a_long_text_is_cut_as_it_is_read(tmp_path, packed):
    text = "\n\n".join(f"{number}. " + "word " * 200 for number in range(400))
    path = tmp_path / ("a.txt.gz" if packed else "a.txt")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    found = first_round(data_of(a=path), "a")
    # lanes share what is short
    assert sorted(" ".join(found).split()) == sorted(text.split())
    assert max(map(len, found)) < 10_000
    # the same without streaming
    assert " ".join(documents(TextDomain(source=str(path)))).split() == text.split()


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_a_data_set_is_read_as_it_comes(tmp_path, tokenizer, monkeypatch, kind):
    found = texts(120)
    if kind == "saved":
        datasets.Dataset.from_dict({"text": found}).save_to_disk(tmp_path)
    for number in range(3) if kind == "files" else ():
        table = pyarrow.table({"text": found[number::3]})
        parquet.write_table(table, tmp_path / f"{number}.parquet", row_group_size=10)
    data = data_of(a=TextDomain(source=str(tmp_path), format="dataset"))
    assert sorted(first_round(data, "a")) == sorted(found)
    assert_each_once(data, Group(data, 2, monkeypatch).steps(blocks_for(data, "a") // 4), tokenizer, "a")
    # a part for each row group: a lane fetches what it reads
    assert len({part.name for part in data._on_the_fly.readings["a"].corpus.parts}) == (12 if kind == "files" else 1)


def test_domains_are_mixed_by_weight(tmp_path, tokenizer, monkeypatch):
    heavy = TextDomain(source=str(rows(tmp_path / "b.jsonl", [f"{n}" + "b" * 50 for n in range(200)])), weight=3)
    light = rows(tmp_path / "a.jsonl", [f"{n}" + "a" * 50 for n in range(200)])
    blocks = Group(data_of(a=light, b=heavy), 1, monkeypatch).steps(100)
    of_b = ["b" in tokenizer.decode(block) for block in blocks]
    assert not any("a" in tokenizer.decode(block) for block, its in zip(blocks, of_b, strict=True) if its)
    # in every stretch of blocks, not only in the long run
    for first in range(0, 200, 40):
        assert abs(sum(of_b[first : first + 40]) - 30) <= 2


def test_conversations_and_special_tokens_are_as_without_streaming(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))
    make_llama(vocab_size=258).save_pretrained(tmp_path / "model")
    with_bos(template=CHATML).save_pretrained(tmp_path / "model")
    talks = [turns(f"{number}?", f"{number}!") for number in range(40)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in talks))
    domains = {
        "talk": TextDomain(source=str(tmp_path / "talk.jsonl"), format="chat"),
        "told": TextDomain(source=str(rows(tmp_path / "told.jsonl", texts(40)))),
    }
    # so many are held out that each side has some by any seed of the texts
    settings = {"tokenizer": str(tmp_path / "model"), "block_size": 8, "validation_tokens": 8, "test_tokens": 8}
    settings["held_out"] = 0.7
    streamed, once = (data_of(each, settings, **domains) for each in (STREAMING, None))
    for name in domains:
        known = [each for stream in once._tokenized[name].streams.values() for each in encoded(stream)]
        on_the_fly = [
            each
            for split in ("train", "validation", "test")
            for each in encoded(streamed._on_the_fly.first(name, split, 10**9))
        ]
        assert sorted(on_the_fly) == sorted(known)
        assert len(known) == 40
    assert known[0][0][0] == BEGIN


def encoded(stream):
    """The documents of a stream, and what of them is predicted."""
    parts = [np.split(each, stream.starts[1:]) for each in (stream.tokens, stream.predicted) if each is not None]
    return [tuple(tuple(each.tolist()) for each in document) for document in zip(*parts, strict=True)]


def test_borders_of_documents_are_masked_or_not(folder, monkeypatch):
    masked, open_ = (data_of(settings={"separate_documents": each}, mixed=folder) for each in (True, False))
    one, other = (next(iter(each.train_dataloader())) for each in (masked, open_))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert (one["position_ids"] == 0).sum() > 2
    assert torch.equal(other["position_ids"], torch.arange(BLOCK).expand(2, -1))
    assert (one["labels"] == IGNORED).sum() == (one["position_ids"] == 0).sum()
    assert (other["labels"][:, 1:] != IGNORED).all()
    # what is evaluated on is kept apart in any case
    assert torch.equal(validated(masked, "labels"), validated(open_, "labels"))


def validated(data, name):
    return next(iter(data.val_dataloader()[0]))[name]


def test_held_out_documents_are_no_training_text(data, straight, tokenizer):
    held = {
        text
        for split in ("validation", "test")
        for text in tokenizer.decode(data._tokenized["mixed"].streams[split].tokens).split(tokenizer.eos_token)[:-1]
    }
    assert len(held) >= 2
    trained = {text for lane in lanes_of(straight, tokenizer) for text in lane}
    assert not held & trained
    calibrated = data._on_the_fly.first("mixed", "train", 500)
    assert not held & set(tokenizer.decode(calibrated.tokens).split(tokenizer.eos_token)[:-1])
    assert held & set(documents(data.domains["mixed"])) == held


def test_loaders_of_the_datamodule(data):
    assert [sum(len(batch["input_ids"]) for batch in each) for each in data.val_dataloader()] == [2]
    assert sum(len(batch["input_ids"]) for batch in data.calibration_batches(BLOCK * 7)) == 7
    described = data.describe()
    again = TextDataModule.from_description(
        described, tokenizer=TINY, batch_size=2, validation_tokens=64, test_tokens=64
    )
    again.prepare_data()
    assert again.describe() == json.loads(json.dumps(described))
    assert torch.equal(validated(again, "input_ids"), validated(data, "input_ids"))


# --- what is refused --------------------------------------------------------------------------------------------


def test_another_text_than_that_of_the_state_is_refused(tmp_path, monkeypatch):
    path = rows(tmp_path / "a.jsonl", texts(60))
    state = Group(data_of(a=path), 1, monkeypatch).state()
    Group(data_of(a=path), 1, monkeypatch, state=state)
    for changed in (data_of(replace(STREAMING, window=9), a=path), data_of(a=rows(path, texts(61)))):
        with pytest.raises(ValueError, match="the text is not what it was when the run was interrupted"):
            Group(changed, 1, monkeypatch, state=state)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_vanishes_is_told(tmp_path, monkeypatch, workers):
    data = data_of(a=rows(tmp_path / "a.jsonl", texts(60)))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"^\S+a.jsonl, bytes 0 to \d+ is not there any more") as caught:
        Group(data, 1, monkeypatch, workers=workers).steps(1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_that_changes_is_told(tmp_path, monkeypatch, workers):
    data = data_of(a=rows(tmp_path / "a.jsonl", texts(60)))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"^\S+a.jsonl changed while it was read: it had \d+ bytes") as caught:
        Group(data, 1, monkeypatch, workers=workers).steps(1)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_told(tmp_path):
    parquet.write_table(pyarrow.table({"body": texts(9), "id": list(range(9))}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="has no column 'text'; it has body, id: set field"):
        data_of(a=tmp_path / "p.parquet")
    with pytest.raises(ValueError, match="has no column 'text'; it has body, id: set field"):
        data_of(a=TextDomain(source=str(tmp_path), format="dataset"))
    rows(tmp_path / "e.jsonl", ["", " "])
    with pytest.raises(ValueError, match="e.jsonl .* holds no text"):
        data_of(a=tmp_path / "e.jsonl")
    (tmp_path / "j.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"j.jsonl, byte 0, has no text in field 'text'; it has body"):
        data_of(a=tmp_path / "j.jsonl")


def test_a_lane_without_a_document_is_told(tmp_path, monkeypatch):
    # all of them but a few are held out
    found = texts(400)
    settings = {"held_out": 0.99}
    data = data_of(
        a=rows(tmp_path / "a.jsonl", [text for text in found if split_of(text, 0.99, 0) != "train"]), settings=settings
    )
    with pytest.raises(ValueError, match="lane 0 of 4 gets no train document of domain a, which has too few of them"):
        Group(data, 1, monkeypatch).steps(1)
    with pytest.raises(ValueError, match="domain a has no validation document"):
        data_of(a=rows(tmp_path / "b.jsonl", [text for text in found if split_of(text, 0.1, 0) == "train"]))


def test_lanes_that_ranks_cannot_share_are_refused(data, monkeypatch):
    with pytest.raises(ValueError, match=r"3 processes with 1 workers each cannot share 4 lanes evenly; set .* to 6"):
        Group(data, 3, monkeypatch)
    # before anything is read
    with pytest.raises(ValueError, match=r"1 processes with 3 workers each cannot share 4 lanes"):
        data_of(settings={"num_workers": 3}, a="python:")
    with pytest.raises(ValueError, match="must be 1 or more, not 0, 256, 1000000000"):
        Streaming(lanes=0)


# --- with processes, and with Lightning -------------------------------------------------------------------------


def _rank(rank, place, folder, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    data = data_of(mixed=folder)
    data._rank_and_world = lambda: (rank, 2)
    loader = data.train_dataloader()
    iterator = iter(loader)
    found = [next(iterator)["input_ids"].tolist() for _ in range(5)]
    results.put((rank, found, loader.state_dict()))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_save_the_same_state_and_one_goes_on(folder, straight, data, monkeypatch, tmp_path):
    forked = multiprocessing.get_context("fork")
    results = forked.Queue()
    ranks = [forked.Process(target=_rank, args=(rank, tmp_path / "meet", folder, results)) for rank in range(2)]
    for each in ranks:
        each.start()
    (_, first, state), (_, second, other) = sorted((results.get(timeout=60) for _ in ranks), key=lambda each: each[0])
    for each in ranks:
        each.join(60)
        assert each.exitcode == 0
    assert [
        row for batches in zip(first, second, strict=True) for rows in zip(*batches, strict=True) for row in rows
    ] == straight[:20]
    assert state == other
    assert Group(data, 1, monkeypatch, state=state).steps(5) == straight[20:30]


class Reads(LightningModule):
    """Learns nothing and notes what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen += batch["input_ids"].tolist()
        return self.weight * 0

    def validation_step(self, batch, _):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, steps, ckpt_path=None):
    module = Reads()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=steps, val_check_interval=2, default_root_dir=folder, **quiet)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module.seen


def test_lightning_goes_on_where_it_was(folder, straight, tmp_path):
    def data():
        return data_of(replace(STREAMING, epoch_tokens=10 * BLOCK), mixed=folder)

    # within an epoch of 5 batches, at its end, and in the next
    seen = []
    for steps in (3, 5, 9):
        seen += fit(data(), tmp_path, steps, tmp_path / f"{len(seen) // 2}.ckpt" if seen else None)
        assert seen == straight[: 2 * steps]
    assert fit(data(), tmp_path, 9) == seen
