"""What is written is read by transformers 4.57 as by the release that runs here: `.ci/older_transformers` makes it.

FLEXTRON_OLDER_PYTHON names that environment's Python; without it nothing here runs.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GemmaTokenizer, GPT2Tokenizer, GPTNeoXTokenizer, LlamaTokenizer, Qwen2Tokenizer

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.routers.from_budget import Selection, to_json
from tests.checkpoint.test_plain_folder import with_begin
from tests.export.conftest import KINDS, export
from tests.export.families import MAKE, SPACE, TEXT, VOCABULARY, make_tokenizer, write_checkpoint
from tests.export.test_matrix import CLASSES, OWN

OLDER = os.environ.get("FLEXTRON_OLDER_PYTHON")
pytestmark = pytest.mark.skipif(
    OLDER is None, reason="FLEXTRON_OLDER_PYTHON names no Python with transformers 4.57: .ci/older_transformers FOLDER"
)
SCRIPT = Path(__file__).parent / "older.py"
TEXTS = (TEXT[:60], "", " a  b\n<|end|> c</s>x", "ünïcödé 12345", "<one> and <two>")
TOLERANCE = 1e-4
HEAD = {"qwen2": 8, "smollm3": 8, "gpt_neox": 8}
"""Rows of a head that turn; 16 in other families."""


def rotations(half):
    """Every kind of position that a config can say, of a base that no class has by default."""
    long = {"short_factor": [1 + 0.1 * i for i in range(half)], "long_factor": [1.5 + 0.3 * i for i in range(half)]}
    early = {"original_max_position_embeddings": 16}
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **early}
    found = {
        "default": {},
        "linear": {"factor": 2.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "beta_fast": 16.0, "mscale": 1.5, "mscale_all_dim": 0.7, **early},
        "longrope": {"factor": 3.0, **long, **early},
        "llama3": llama3,
    }
    return {name: {"rope_type": name, "rope_theta": 500000.0, **more} for name, more in found.items()}


def variants(family):
    """Settings of a family's tiny model, by rotation."""
    if family == "gpt2":
        return {"learned": {}}
    share = {"partial_rotary_factor": 0.5} if family == "gpt_neox" else {}
    return {name: {"rope_parameters": rope | share} for name, rope in rotations(HEAD.get(family, 16) // 2).items()}


def pieces():
    """Byte-level merges, and such of characters with byte fallback as Llama 2 has them."""
    model = json.loads(make_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    vocab |= {
        piece: len(vocab) + index for index, piece in enumerate(("▁", "t", "h", "e", "o", "w", "▁t", "he", "▁the"))
    }
    return (model["vocab"], merges), (vocab, [("▁", "t"), ("h", "e"), ("▁t", "he")])


def tokenizers():
    """Family and tokenizer: of every class that the families come with, and with what users add."""
    (vocab, merges), (spelled, joined) = pieces()
    ends = {"unk_token": "<|end|>", "eos_token": "<|end|>", "bos_token": "<|end|>"}
    named = make_tokenizer()
    named.add_special_tokens({"additional_special_tokens": ["<one>", "<two>"]})
    named.chat_template = {"default": "{{ messages[0]['content'] }}!", "tool": "{{ messages }}?"}
    renamed = {{"<s>": "<bos>", "</s>": "<eos>"}.get(name, name): index for name, index in spelled.items()}
    yield "named", "smollm3", named
    yield "begins", "llama", with_begin()
    yield "gpt2", "gpt2", GPT2Tokenizer(vocab=vocab, merges=merges, add_prefix_space=True, **ends)
    yield "neox", "gpt_neox", GPTNeoXTokenizer(vocab=vocab, merges=merges, **ends)
    yield "qwen2", "qwen2", Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=None, eos_token="<|end|>")
    yield "gemma", "gemma", GemmaTokenizer(vocab=renamed | {"<pad>": len(renamed)}, merges=joined)
    for name, settings in {"llama": {}, "bare": {"add_bos_token": False}, "ends": {"add_eos_token": True}}.items():
        yield f"spelled-{name}", "mistral", LlamaTokenizer(vocab=spelled, merges=joined, **settings)


def write_all(root, selection):
    for family, make in MAKE.items():
        for rotation, more in variants(family).items():
            folder = write_checkpoint(root / f"{family}-{rotation}", make(**more))
            space = ElasticBackbone(make(**more), SPACE).space
            for kind in KINDS if rotation in ("default", "learned") else ("narrow-mlp",):
                answer = to_json(Selection("0.7", KINDS[kind](space), "by hand", None), space, {})
                selection.write_text(json.dumps(answer))
                assert export(folder, selection, root / f"{family}-{rotation}-{kind}") is None
    for name, family, tokenizer in tokenizers():
        # written from what was loaded, which notes how
        tokenizer.save_pretrained(root / "source")
        MAKE[family]().config.save_pretrained(root / "source")
        from flextron_lit.sources import load_tokenizer

        loaded = load_tokenizer(f"random:{root / 'source'}")
        write_checkpoint(root / f"tokenizer-{name}", MAKE[family](), loaded)
        (root / f"tokenizer-{name}.ids").write_text(json.dumps([loaded(text)["input_ids"] for text in TEXTS]))
        shutil.rmtree(root / "source")


def read(python, root, at):
    """Tensors and a note of every folder, by a release."""
    shutil.copytree(root, at)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(at / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, "-I", str(SCRIPT), str(at)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    notes = {path.stem: json.loads(path.read_text()) for path in (at / "results").glob("*.json")}
    found = {name: (load_file(at / "results" / f"{name}.safetensors"), note) for name, note in notes.items()}
    return (at / "results/version.txt").read_text(), found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("written")
    write_all(root, tmp_path_factory.mktemp("selection") / "answer.json")
    ids = torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
    save_file({"ids": ids}, root / "ids.safetensors")
    (root / "texts.json").write_text(json.dumps(TEXTS))
    return root


@pytest.fixture(scope="module")
def older(root, tmp_path_factory):
    version, found = read(OLDER, root, tmp_path_factory.mktemp("older") / "root")
    assert version.startswith("4.57."), f"{OLDER} has transformers {version}"
    return found


@pytest.fixture(scope="module")
def newer(root, tmp_path_factory):
    return read(sys.executable, root, tmp_path_factory.mktemp("newer") / "root")[1]


def own(name):
    """Whether an export is of a class of ours."""
    family, _, kind = (*name.split("-", 2), "")[:3]
    return CLASSES.get((family, kind)) in OWN.values()


def test_stock_folders_say_the_same(older, newer):
    stock = [name for name in newer if not own(name)]
    assert len(stock) > 90
    assert {name: older[name][1]["error"] for name in stock if "error" in older[name][1]} == {}
    apart = {}
    for name in stock:
        (found, note), (expected, other) = older[name], newer[name]
        apart[name] = float((found["logits"] - expected["logits"]).abs().max() / expected["logits"].abs().max())
        assert torch.equal(found["said"], expected["said"]), name
        assert {key: note[key] for key in ("ids", "bare", "decoded", "chat", "length")} == {
            key: other[key] for key in ("ids", "bare", "decoded", "chat", "length")
        }, name
    assert {name: far for name, far in apart.items() if far > TOLERANCE} == {}


def test_tokenizers_give_the_ids_that_they_gave_before(root, older):
    for name, note in ((name, note) for name, (_, note) in older.items() if name.startswith("tokenizer-")):
        assert note["ids"] == json.loads((root / f"{name}.ids").read_text()), name


def test_own_classes_refuse_in_one_line(older, newer):
    ours = [name for name in newer if own(name)]
    assert len(ours) == 2 * len(OWN) + 2
    for name in ours:
        assert "error" not in newer[name][1], name
        error = older[name][1]["error"]
        assert error.startswith("ImportError: this model's layers have widths of their own"), name
        assert "\n" not in error


def test_the_older_names_are_what_it_reads(root, tmp_path):
    """The control: without them it computes something else, and says nothing."""
    folder = tmp_path / "root"
    for name in ("llama-linear", "gpt_neox-default"):
        shutil.copytree(root / name, folder / name)
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        without = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling", "rotary_emb_base")}
        path.write_text(json.dumps(without))
    for name in ("ids.safetensors", "texts.json"):
        shutil.copy(root / name, folder / name)
    (_, found), (_, expected) = (
        read(OLDER, folder, tmp_path / "older"),
        read(sys.executable, folder, tmp_path / "newer"),
    )
    for name in ("llama-linear", "gpt_neox-default"):
        apart = (found[name][0]["logits"] - expected[name][0]["logits"]).abs().max()
        assert apart > 100 * TOLERANCE * expected[name][0]["logits"].abs().max(), name
