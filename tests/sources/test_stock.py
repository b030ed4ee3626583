"""No Python of a model's folder runs, whatever asks for it and whoever answers."""

import ast
import builtins
import json
import os
import shutil
import subprocess

import pytest
import torch

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.sources import load_dense, load_tokenizer
from tests.front_door import ENVIRONMENT, ROOT, command, fail
from tests.house import product

TINY = ROOT / "configs/models/tiny-llama"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path(__file__).with_name("ran").touch()
Path({witness!r}).touch()


class Config(LlamaConfig):
    model_type = {model_type!r}


class Model(LlamaForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
MODEL = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
TOKENIZER = {"AutoTokenizer": [None, "mine.Tokenizer"]}
WITNESSES = {
    "a model of its own": ("config.json", {"auto_map": MODEL, "model_type": "mine"}),
    "a model that calls itself Llama": ("config.json", {"auto_map": MODEL}),
    "a tokenizer": ("tokenizer_config.json", {"auto_map": TOKENIZER}),
    "a tokenizer, as once": ("tokenizer_config.json", {"auto_map": ["mine.Tokenizer", None]}),
    "a tokenizer in the model's file": ("config.json", {"auto_map": TOKENIZER}),
    "code from elsewhere": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "some/where--a.B"]}}),
}


@pytest.fixture
def asked(monkeypatch):
    """What is asked on standard input; the answer is yes."""
    questions = []
    monkeypatch.setattr(builtins, "input", lambda text="": questions.append(text) or "y")
    return questions


def write(folder, name, more):
    """The tiny Llama with Python beside it, and what asks for that; returns the file that the Python would write."""
    shutil.copytree(TINY, folder)
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    witness = folder.with_suffix(".ran")
    (folder / "mine.py").write_text(CODE.format(witness=str(witness), model_type=more.get("model_type", "llama")))
    return witness


@pytest.mark.parametrize("case", WITNESSES)
def test_a_folder_that_asks_for_its_code_is_refused_unasked(tmp_path, asked, case):
    name, more = WITNESSES[case]
    witness = write(tmp_path / "model", name, more)
    for source in (f"random:{tmp_path / 'model'}", str(tmp_path / "model")):
        for load in (load_dense, load_tokenizer, load_elastic):
            with pytest.raises(ValueError, match=rf"{name} asks for Python code of its own .* never run here") as told:
                load(source)
            assert "\n" not in str(told.value)
    assert not asked
    assert not witness.exists()


def test_code_for_what_is_not_read_here_is_in_nobodys_way(tmp_path, asked):
    witness = write(tmp_path / "model", "config.json", {"auto_map": {"AutoModelForSequenceClassification": "mine.M"}})
    assert type(load_dense(f"random:{tmp_path / 'model'}")).__name__ == "LlamaForCausalLM"
    assert not asked
    assert not witness.exists()


def test_code_that_generates_is_left_alone(tmp_path, asked):
    dense = tmp_path / "dense"
    load_dense(f"random:{TINY}").save_pretrained(dense)
    (dense / "custom_generate").mkdir()
    (dense / "custom_generate/generate.py").write_text(CODE.format(witness=str(tmp_path / "ran"), model_type="llama"))
    assert load_dense(str(dense)).generate(torch.tensor([[1, 2]]), max_new_tokens=2, eos_token_id=None).shape == (1, 4)
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_an_exported_class_of_ours_is_no_source(tmp_path):
    write(tmp_path / "model", "config.json", {"auto_map": MODEL, "model_type": "flextron_llama"})
    with pytest.raises(ValueError, match="is an exported sub-network; name the Flextron checkpoint"):
        load_dense(str(tmp_path / "model"))


def test_a_command_says_it_in_one_line(tmp_path):
    write(tmp_path / "model", "config.json", {"auto_map": MODEL, "model_type": "mine"})
    said = fail(
        *("convert", "--checkpoint", f"random:{tmp_path / 'model'}", "--text", ROOT / "README.md"),
        *("--output", tmp_path / "out"),
    )
    assert "never run here" in said.strip().splitlines()[-1]
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("case", ["a model of its own", "a tokenizer"])
def test_yes_to_everything_runs_nothing(tmp_path, case):
    witness = write(tmp_path / "model", *WITNESSES[case])
    fit = ("fit", "-c", ROOT / "configs/debug.yaml", "--trainer.max_steps", 2, "--run_folder", tmp_path / "run")
    arguments = command(*fit, "--model.init_args.checkpoint", f"random:{tmp_path / 'model'}")
    done = subprocess.run(
        ["sh", "-c", 'yes | "$@"', "sh", *arguments],
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "never run here" in done.stderr.strip().splitlines()[-1]
    assert "[y/N]" not in done.stdout + done.stderr
    assert not witness.exists()
    assert not list((tmp_path / "modules").rglob("mine.py"))


def test_no_call_goes_past_the_one_helper():
    helper = "flextron_lit/sources/stock.py"
    texts = product() | {str(p.relative_to(ROOT)): p.read_text() for p in (ROOT / "benchmarks").glob("*.py")}
    found = {path: [*_unsafe(ast.parse(text))] for path, text in texts.items() if path != helper}
    assert {path: lines for path, lines in found.items() if lines} == {}
    # the control: this is what it is to find
    assert [*_unsafe(ast.parse("AutoConfig.from_pretrained(folder)\nkind.from_pretrained(folder)"))] == [1, 2]
    settings = [call.keywords for call in _loading(ast.parse(texts[helper]))]
    assert len(settings) == 2
    assert all(any(each.arg == "trust_remote_code" and each.value.value is False for each in s) for s in settings)


def _loading(tree):
    """Calls that make something of a folder or its config."""
    for node in ast.walk(tree):
        called = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if called in ("from_pretrained", "from_config", "pipeline"):
            yield node


def _unsafe(tree):
    """Lines that load by another way than ours, and do not say that no code is to run."""
    for call in _loading(tree):
        ours = isinstance(call.func.value, ast.Name) and call.func.value.id in ("FlextronModel", "cls")
        said = any(each.arg == "trust_remote_code" and ast.literal_eval(each.value) is False for each in call.keywords)
        if not ours and not said:
            yield call.lineno
