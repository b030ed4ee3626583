"""What a network cannot read is refused before anything is tokenised; ids are kept however far apart they are."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.commands.convert import text_of
from flextron_lit.data import TextDataModule, TextDomain, datamodule, tokenized
from flextron_lit.losses.measured_loss import mean_loss
from flextron_lit.stages import DynamicRouterTraining, ElasticTraining, SurrogateTraining
from tests.conftest import make_gpt2
from tests.data.chat import tokenizer_with
from tests.served import write

TALES = {"tales": TextDomain(source="generated:20,0")}
SIZES = {"block_size": 32, "validation_tokens": 64, "test_tokens": 64}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def prepare(monkeypatch):
    """Prepare text for a model, and tell of which domains anything was tokenised."""

    def prepare(config, tokenizer=None, stage=None, domains=TALES, **settings):
        monkeypatch.setattr(datamodule, "load_config", lambda source: config)
        monkeypatch.setattr(datamodule, "load_tokenizer", lambda source: tokenizer or tokenizer_with(None))
        data = TextDataModule(domains, **(SIZES | {"tokenizer": "x"} | settings))
        if stage is not None:
            stage.attach(data)
        data.prepare_data()
        return data

    return prepare


def refused_before_tokenising(prepare, monkeypatch, message, *arguments, **settings):
    monkeypatch.setattr(datamodule, "tokenized", lambda *_, **__: pytest.fail("something was tokenised"))
    with pytest.raises(ValueError, match=message):
        prepare(*arguments, **settings)


GPT2 = GPT2Config(vocab_size=257, n_positions=48)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "data.init_args.block_size 64 takes 64 positions, but the model has 48; lower it"),
        (SurrogateTraining, "model.init_args.block_size 256 takes 256 positions, but the model has 48"),
        (DynamicRouterTraining, "model.init_args.block_size 128 takes 128 positions, but the model has 48"),
    ],
)
def test_blocks_beyond_learnt_positions(prepare, monkeypatch, make, message):
    stage = make and make(checkpoint="random:configs/models/tiny-llama")
    size = 64 if make is None else 32
    refused_before_tokenising(prepare, monkeypatch, message, GPT2, stage=stage, block_size=size)


def test_blocks_that_fit_are_read(prepare):
    stage = ElasticTraining(checkpoint="random:configs/models/tiny-llama")
    assert prepare(GPT2, stage=stage, block_size=48, validation_tokens=96, test_tokens=96).special_tokens is None


def words(**vocabulary):
    """A tokenizer of whole words whose ids have gaps."""
    backend = Tokenizer(models.WordLevel({"?": 0, "<end>": 1} | vocabulary, unk_token="?"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="?")


def test_tokens_of_every_text_that_the_network_does_not_know(prepare, monkeypatch):
    message = "the tokenizer has 'far', token 70000, but the network knows 258; take the tokenizer that it was trained"
    refused_before_tokenising(prepare, monkeypatch, message, LlamaConfig(vocab_size=258), words(far=70000))
    small = LlamaConfig(vocab_size=256)
    refused_before_tokenising(prepare, monkeypatch, "'<|endoftext|>', token 256, but the network knows 256", small)


def test_an_added_token_is_refused_where_a_text_spells_it(prepare, tmp_path):
    tokenizer = tokenizer_with(None)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    config = LlamaConfig(vocab_size=257)
    assert prepare(config, tokenizer).describe()["domains"]["tales"]["tokens"]["train"] > 0
    path = tmp_path / "mine.txt"
    path.write_text("word " * 3000 + "<pad>")
    with pytest.raises(ValueError, match="domain mine holds '<pad>', token 257, but the network knows 257"):
        prepare(config, tokenizer, domains={"mine": TextDomain(source=str(path))})


@pytest.mark.parametrize(("far", "dtype"), [(70000, "uint32"), (2**16, "uint32"), (2**16 - 1, "uint16")])
def test_ids_are_kept_whatever_their_number(tmp_path, far, dtype):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "far"}\n' * 6)
    made = tokenized.tokenized("rows", TextDomain(source=str(path)), words(far=far), held_out=0.3, seed=0)
    stream = made.streams["train"]
    assert stream.tokens.dtype == dtype
    assert set(torch.from_numpy(stream.tokens.astype("int64")).tolist()) == {far, 1}


@pytest.mark.parametrize("name", [False, 2024, 1.5, None, "", " "])
def test_a_name_that_is_no_text_is_refused(name):
    with pytest.raises(ValueError, match="the name of a domain is text, not .*; in YAML put it in quotes"):
        TextDataModule({name: TALES["tales"]}, tokenizer="x")


def test_a_text_too_short_names_its_domain_and_the_remedy(prepare, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("short")
    with pytest.raises(ValueError, match="domain mine: 1 documents are too few to hold out .*; add text or files"):
        prepare(GPT2, domains={"mine": TextDomain(source=str(path))})
    with pytest.raises(ValueError, match="blocks of domain tales; it has .*; add text, or lower the tokens to"):
        prepare(GPT2).calibration_batches(10**6)


# --- as stages and commands have it -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [(None, False), ({}, False), ({"special_tokens": True}, True), ({"special_tokens": False}, False)],
)
@pytest.mark.parametrize("make", [ElasticTraining, SurrogateTraining])
def test_a_stage_goes_on_with_special_tokens_as_its_checkpoint_was_made(tmp_path, make, said, expected):
    history = [] if said is None else [{"stage": "Conversion", "data": {"block_size": 32} | said}]
    write(tmp_path / "flextron", history=history, routers=())
    data = TextDataModule(TALES, tokenizer="x")
    make(checkpoint=str(tmp_path / "flextron")).attach(data)
    assert data.special_tokens is expected
    # unless someone says otherwise
    data = TextDataModule(TALES, tokenizer="x", special_tokens=not expected)
    make(checkpoint=str(tmp_path / "flextron")).attach(data)
    assert data.special_tokens is not expected


@pytest.fixture
def narrow(tmp_path):
    """A dense GPT-2 of 48 positions."""
    make_gpt2(vocab_size=257, max_position_embeddings=48).save_pretrained(tmp_path / "gpt2")
    tokenizer_with(None).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_what_commands_measure_on_is_cut_to_what_the_network_reads(narrow, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a row of some words"}\n' * 20)
    loaded = load_elastic(str(narrow))
    batches = loaded.batches_of(tmp_path / "rows.jsonl", 199)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 48)] * 4
    assert mean_loss(loaded.backbone.model, batches) > 0
    with pytest.raises(
        ValueError, match="rows.jsonl has 199 tokens, fewer than the 200 asked for; add text, or ask for"
    ):
        loaded.batches_of(tmp_path / "rows.jsonl", 200)
    (tmp_path / "x.txt.gz").write_bytes(b"\x1f\x8b\0")
    with pytest.raises(ValueError, match="x.txt.gz is damaged, or not what the end of its name says"):
        loaded.batches_of(tmp_path / "x.txt.gz", 48)
    assert text_of(["generated:20"], None, str(narrow)).block_size == 48
