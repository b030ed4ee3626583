"""From a dense model to answers within budgets, by one command and without training."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flextron_lit import FlextronModel, checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.routers.excess import FILE, ExcessTable
from flextron_lit.routers.feasible_decoding import Bound, decode
from flextron_lit.terminal.console import short
from tests.front_door import fail, succeed

TINY = "random:configs/models/tiny-llama"
TEXT = ("--text", "generated:200,0", "--calibration.tokens", 2048, "--calibration.excess_tokens", 1024)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "elastic"
    said = succeed("convert", "--checkpoint", TINY, *TEXT, "--output", folder)
    assert f"wrote {folder}" in said
    return folder


def test_the_full_network_is_the_dense_one_and_loads_without_us(converted, tmp_path):
    tokens = torch.arange(1, 40)[None]
    dense = load_elastic(TINY).backbone.model
    full = AutoModelForCausalLM.from_pretrained(converted)
    torch.testing.assert_close(full(tokens).logits, dense(tokens).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(FlextronModel.from_pretrained(converted)(tokens).logits, full(tokens).logits)
    assert not any("compensation" in name for name in load_file(converted / "model.safetensors"))
    # the control: what narrower widths have of their own is in a folder of its own, and counts
    model = FlextronModel.from_pretrained(converted)
    half = model.backbone.space.uniform(mlp=0.5)
    with model.use(half):
        own = model(tokens).logits
    plain = shutil.copytree(converted, tmp_path / "plain")
    (plain / checkpoint.COMPENSATION).unlink()
    record = json.loads((plain / checkpoint.RECORD).read_text())
    del record["sha256"]
    (plain / checkpoint.RECORD).write_text(json.dumps(record))
    without = FlextronModel.from_pretrained(plain)
    with without.use(half):
        assert (without(tokens).logits - own).abs().max() > 1e-3


def test_budgets_of_what_is_counted_are_answered_by_the_excess_losses(converted):
    for budget, name in (("parameters=0.7", "parameters"), ("flops=0.6", "flops"), ("memory=0.7", "memory")):
        found = json.loads(succeed("select", "--checkpoint", converted, "--budget", budget, "--json"))
        assert found["how"].startswith("a search by the excess losses")
        assert found["costs"][name]["ratio"] <= float(budget.partition("=")[2])
    loaded = load_elastic(str(converted))
    space, excess = loaded.backbone.space, ExcessTable.read(converted, loaded.backbone.space)
    assert excess.tokens == 1024
    # no single change within the limit would be better: what the search promises
    table = loaded.routing().tables["parameters"]
    answer = loaded.answer("parameters=0.7").sub_network
    chosen = torch.tensor([answer.choices])
    bounds = [Bound(table, torch.tensor([0.7 * table.full]).double())]
    assert decode(space, chosen, bounds, excess.objective(table))[0].tolist() == chosen.tolist()


def test_what_is_exported_is_what_the_budget_runs(converted, tmp_path):
    succeed(
        "export", "--checkpoint", converted, "--budget", "parameters=0.7", "--output", tmp_path / "small",
        "--format", "remote-code",
    )  # fmt: skip
    tokens = torch.arange(1, 40)[None]
    model = FlextronModel.from_pretrained(converted)
    model.set_budget("parameters=0.7")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    torch.testing.assert_close(small(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    model.set_budget(1.0)
    assert (small(tokens).logits - model(tokens).logits).abs().max() > 1e-3
    # what narrower widths have of their own is no part of the full network
    dense = AutoModelForCausalLM.from_pretrained(converted).num_parameters()
    card = (tmp_path / "small/README.md").read_text()
    assert f"{small.num_parameters() / dense:.3f} of the full network's {short(dense)}" in card


def test_training_goes_on_from_there(converted, tmp_path):
    run = tmp_path / "run"
    settings = ("--trainer.max_steps", 2, "--trainer.val_check_interval", 2)
    succeed(
        "fit", "-c", "configs/debug.yaml", *settings, "--run_folder", run,
        "--model.init_args.checkpoint", converted, "--model.init_args.space", "null",
        "--model.init_args.distillation.full_from_original", 0,
        "--model.init_args.validation.uniform", json.dumps([{"mlp": 0.5}]),
    )  # fmt: skip
    trained = run / "flextron"
    before, after = (load_file(folder / checkpoint.COMPENSATION) for folder in (converted, trained))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (trained / FILE).read_bytes() == (converted / FILE).read_bytes()
    assert [row["stage"] for row in checkpoint.read(trained).history] == ["Conversion", "ElasticTraining"]


def test_python_writes_and_reads_it_back(converted, tmp_path):
    model = FlextronModel.from_pretrained(converted)
    model.save_pretrained(tmp_path / "copy")
    for name in (checkpoint.COMPENSATION, FILE):
        assert (tmp_path / "copy" / name).read_bytes() == (converted / name).read_bytes()
    assert model.set_budget("parameters=0.7") == FlextronModel.from_pretrained(tmp_path / "copy").set_budget(
        "parameters=0.7"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibration.compensation", "scales"), "greedy counts on own projections"),
        (("--calibration.importance", "size"), "importance"),
        (("--space.mlp", "[0.3, 1.0]"), "not a whole number"),
        (("--calibration.tokens", 10**9), "needs 1953125 blocks of domain"),
    ],
)
def test_a_mistake_is_one_clear_line(options, message, tmp_path):
    printed = fail("convert", "--checkpoint", TINY, *TEXT, "--output", tmp_path / "out", *options)
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_a_config_names_texts_too(tmp_path):
    few = TEXT[2:]
    done = succeed(
        "convert", "--checkpoint", TINY, "--data", "configs/data/generated.yaml", *few, "--output", tmp_path / "a"
    )
    assert "wrote" in done
    described = checkpoint.read(tmp_path / "a").history[0]["data"]
    assert set(described["domains"]) == {"stories", "reports"}
    for options, message in (
        ((), "name the text to calibrate on"),
        ((*TEXT[:2], "--data", "configs/data/generated.yaml"), "name the text to calibrate on"),
        (("--data", "configs/trainer/cpu.yaml"), "is no config of texts"),
        (("--data", "nowhere.yaml"), "nowhere.yaml"),
    ):
        assert message in fail("convert", "--checkpoint", TINY, *few, *options, "--output", tmp_path / "b")


def test_what_is_there_is_not_replaced_by_accident(converted, tmp_path):
    assert "exists; name another place" in fail("convert", "--checkpoint", TINY, *TEXT, "--output", converted)
    (tmp_path / "mine").mkdir()
    options = ("--output", tmp_path / "mine", "--overwrite")
    assert "exists; name another place" in fail("convert", "--checkpoint", TINY, *TEXT, *options)
    assert "Flextron checkpoint already" in fail(
        "convert", "--checkpoint", converted, *TEXT, "--output", tmp_path / "again"
    )
