"""A pipeline of the user's own model and text: `--checkpoint` and `--text` in place of what the config says."""

import json
import os
import platform

import pytest
import yaml
from transformers import AutoModelForCausalLM

from flextron_lit import checkpoint
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.sources import load_dense, load_tokenizer
from tests.front_door import ROOT, fail, succeed

TINY = f"random:{ROOT / 'configs/models/tiny-llama'}"


@pytest.fixture
def own(tmp_path):
    """A folder with a model, a text file, a folder of text, and a pipeline of one short stage."""
    model = load_dense(TINY)
    model.save_pretrained(tmp_path / "model")
    load_tokenizer(TINY).save_pretrained(tmp_path / "model")
    paragraphs = "\n\n".join(f"{n}: the owl at the mill counts {n * n} grains of wheat. " * 4 for n in range(200))
    (tmp_path / "my book.txt").write_text(paragraphs)
    (tmp_path / "letters").mkdir()
    for n in range(20):
        (tmp_path / "letters" / f"{n}.txt").write_text(paragraphs[n * 500 : n * 500 + 4000])
    settings = {"trainer": {"max_steps": 2, "val_check_interval": 2}}
    stage = {"configs": [str(ROOT / "configs/debug.yaml")], "settings": settings}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"stages": {"elastic": stage}}))
    return tmp_path


def test_checkpoint_and_text_replace_those_of_the_config(own):
    pipeline = ("pipeline", "-c", own / "pipeline.yaml", "--run_folder", own / "runs")
    texts = ("--text", own / "my book.txt", own / "letters")
    printed = succeed(*pipeline, "--checkpoint", own / "model", *texts)
    assert "pipeline finished: 1 of 1 stages" in printed
    (record,) = checkpoint.read(own / "runs/elastic/flextron").history
    domains = record["data"]["domains"]
    assert {name: each["source"] for name, each in domains.items()} == {
        "my_book": str(own / "my book.txt"),
        "letters": str(own / "letters"),
    }
    assert domains["my_book"]["documents"]["train"] > 5
    config = yaml.safe_load((own / "runs/elastic/config.yaml").read_text())
    assert config["model"]["init_args"]["checkpoint"] == str(own / "model")
    rows = json.loads((own / "runs/elastic/training.json").read_text())
    assert {row["domain"] for row in rows} == {"my_book", "letters"}


def test_the_depth_recipe_gives_stock_models_of_fewer_layers(own):
    recipe = yaml.safe_load((ROOT / "configs/depth.yaml").read_text())
    (stage,) = recipe["stages"].values()
    stage["configs"] = [str(ROOT / "configs" / path) for path in stage["configs"] if "models/" not in path]
    settings = stage["settings"]
    # of the three layers of the tiny model
    settings["model"]["init_args"]["calibration"] |= {"tokens": 64, "excess_tokens": 128}
    settings["data"]["init_args"] |= {"block_size": 64, "validation_tokens": 128, "test_tokens": 128}
    settings["trainer"] |= {"max_steps": 4, "val_check_interval": 4}
    _, profiling = settings["trainer"]["callbacks"]
    profiling["init_args"] = {"seconds": 0.1, "held_out": 0}
    (own / "depth.yaml").write_text(yaml.safe_dump(recipe))
    succeed(
        "pipeline", "-c", own / "depth.yaml", "--run_folder", own / "runs", "--checkpoint", own / "model",
        "--text", own / "my book.txt",
    )  # fmt: skip
    trained = own / "runs/elastic"
    table = json.loads((trained / "flextron/elastic/excess_losses.json").read_text())
    assert sorted(each["layer"] for each in table["layers"]) == [1, 2]
    succeed("export", "--checkpoint", trained, "--budget", "parameters=0.9", "--output", own / "small")
    small = AutoModelForCausalLM.from_pretrained(own / "small")
    assert type(small).__name__ == "LlamaForCausalLM"
    assert small.config.num_hidden_layers == len(small.model.layers) == 2


def test_the_end_of_a_files_name_says_its_format(own):
    rows = [json.dumps({"text": f"the owl at the mill, {n}. " * 20, "id": n}) for n in range(40)]
    (own / "rows.jsonl").write_text("\n".join(rows))
    succeed("pipeline", "-c", own / "pipeline.yaml", "--run_folder", own / "runs", "--text", own / "rows.jsonl")
    (record,) = checkpoint.read(own / "runs/elastic/flextron").history
    assert record["data"]["domains"]["rows"]["format"] == "jsonl"
    # read as plain text it would be one document cut into a few
    assert sum(record["data"]["domains"]["rows"]["documents"].values()) == len(rows)


def test_two_texts_of_one_name_are_refused(own):
    (own / "letters.txt").write_text("another")
    error = fail("pipeline", "-c", own / "pipeline.yaml", "--text", own / "letters", own / "letters.txt")
    assert "--text names two sources 'letters'" in error
    assert not (own / "runs").exists()


def test_a_second_pipeline_in_the_folder_is_refused(own):
    pipeline = ("pipeline", "-c", own / "pipeline.yaml", "--run_folder", own / "runs")
    # as between two stages, whose folders no one holds
    with RunFolder(own / "runs").lock():
        error = fail(*pipeline)
    assert f"error: process {os.getpid()} on {platform.node()} is working in {own / 'runs'}; wait for it" in error
    assert not (own / "runs/pipeline.json").exists()
    assert not (own / "runs/elastic").exists()
