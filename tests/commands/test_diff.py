import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_lit.checkpoint import comparison
from flextron_lit.checkpoint.comparison import compare, compare_tensors
from flextron_lit.commands.diff import report
from flextron_lit.space import SpaceConfig
from flextron_lit.terminal.console import show
from tests.checkpoint.conftest import RECORD, write_checkpoint
from tests.conftest import make_llama
from tests.front_door import fail, run, succeed

UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def other(tmp_path, written):
    """A second checkpoint that is the same."""
    folder = tmp_path / "two"
    write_checkpoint(folder)
    return folder


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def differing(found):
    return {name for name, part in found.items() if name != "identical" and part}


def printed(one, two, capsys):
    show(*report(compare(one, two)))
    return capsys.readouterr().out


def test_the_same_is_identical(written, other, capsys):
    assert compare(written, other)["identical"] is True
    assert printed(written, other, capsys) == "identical\n"


def test_one_element_is_found_and_measured(written, other):
    rewrite(other, lambda tensors: tensors[UP][3, 4].add_(0.5))
    found = compare(written, other)
    assert found["identical"] is False
    assert differing(found) == {"weights"}
    before = load_file(written / "model.safetensors")
    tensor = found["weights"]["tensors"][UP]
    assert tensor["largest"] == pytest.approx(0.5, rel=1e-5)
    assert tensor["relative"] == pytest.approx(0.5 / before[UP].norm().item(), rel=1e-5)
    assert list(found["weights"]["tensors"]) == [UP]
    parts = found["weights"]["parts"]
    assert parts["mlp"]["tensors"] - parts["mlp"]["equal"] == 1
    of_part = torch.cat([t.flatten() for name, t in before.items() if "mlp" in name])
    assert parts["mlp"]["relative"] == pytest.approx(0.5 / of_part.norm().item(), rel=1e-5)
    for part in ("attention", "norms", "embedding"):
        assert parts[part] == {"tensors": parts[part]["equal"], "equal": parts[part]["equal"]} | {
            "largest": 0,
            "relative": 0,
        }


def test_what_changed_most_comes_first(written, other, capsys):
    def change(tensors):
        tensors[UP] *= 1.01
        tensors[DOWN] *= 2

    rewrite(other, change)
    assert list(compare(written, other)["weights"]["tensors"]) == [DOWN, UP]
    shown = printed(written, other, capsys)
    assert f"{DOWN} │ largest" in shown
    assert "relative 1 " in shown
    assert "differing: weights; the same: space, config, history, order, files" in shown


def test_tensors_in_one_only_and_in_another_form_are_named(written, other, capsys):
    def change(tensors):
        tensors["extra.weight"] = tensors.pop("model.norm.weight")
        tensors[UP] = tensors[UP][:8].contiguous()
        tensors[DOWN] = tensors[DOWN].bfloat16()

    rewrite(other, change)
    weights = compare(written, other)["weights"]
    assert weights["only_in_first"] == ["model.norm.weight"]
    assert weights["only_in_second"] == ["extra.weight"]
    assert weights["other_form"] == {
        UP: "F32 [64, 32] -> F32 [8, 32]",
        DOWN: "F32 [32, 64] -> BF16 [32, 64]",
    }
    assert 0 < weights["tensors"][DOWN]["relative"] < 0.01
    assert UP not in weights["tensors"]
    shown = printed(written, other, capsys)
    assert "model.norm.weight: only in the first" in shown
    assert "extra.weight: only in the second" in shown


def test_another_shape_alone_is_a_difference(written, other):
    rewrite(other, lambda tensors: tensors.update({UP: tensors[UP][:8].contiguous()}))
    assert differing(compare(written, other)) == {"weights"}


def test_settings_read_key_from_to(tmp_path, written):
    changed = json.loads(json.dumps(RECORD))
    changed["settings"]["optimizer"]["lr"] = 0.5
    changed["data"]["domains"]["stories"]["tokens"]["train"] = 1
    write_checkpoint(tmp_path / "two", history=[changed])
    found = compare(written, tmp_path / "two")
    assert found["history"] == [
        "stage 1.data.domains.stories.tokens.train: 4321 -> 1",
        "stage 1.settings.optimizer.lr: 0.25 -> 0.5",
    ]
    assert differing(found) == {"history"}


def test_a_stage_more_is_one_line(tmp_path, written):
    write_checkpoint(tmp_path / "two", history=[RECORD, RECORD | {"stage": "Router", "steps": 7}])
    assert compare(written, tmp_path / "two")["history"] == ["stage 2: None -> 'Router, 7 steps from pypi:model==1.0'"]


def test_widths_that_changed_alike_are_one_line(tmp_path, written):
    write_checkpoint(tmp_path / "two", space=SpaceConfig(mlp=[32, 64], attention=[0, 1, 2, 4]))
    found = compare(written, tmp_path / "two")
    assert found["space"] == ["layers 0-2, mlp: [0, 16, 32, 64] -> [32, 64]"]
    assert differing(found) == {"space"}


def test_blocks_that_are_sorted_differently_are_named(tmp_path, written, capsys):
    write_checkpoint(tmp_path / "two", flipped=False)
    found = compare(written, tmp_path / "two")
    assert differing(found) == {"order"}
    assert found["order"]["layers.0.mlp"] == 64
    assert len(found["order"]) == 6
    assert "6 blocks are sorted differently" in printed(written, tmp_path / "two", capsys)


def test_config_and_other_files_are_compared(written, other):
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta_extra": 5}))
    (other / "tokenizer.json").write_text("{ }")
    (other / "costs").mkdir()
    (other / "costs" / "latency.json").touch()
    found = compare(written, other)
    assert found["config"] == ["rope_theta_extra: None -> 5"]
    assert found["files"] == ["costs/latency.json: only in the second", "tokenizer.json: differs"]
    assert compare(other, written)["files"] == ["costs/latency.json: only in the first", "tokenizer.json: differs"]


def test_the_split_into_files_is_no_difference(written, other):
    model = make_llama()
    (other / "model.safetensors").unlink()
    model.save_pretrained(other, max_shard_size="20KB")
    assert compare(written, other)["identical"] is True


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_tensors_are_measured_piece_by_piece(monkeypatch, chunk, generator):
    monkeypatch.setattr(comparison, "CHUNK", chunk)
    one, other = torch.randn(2, 5, 9, generator=generator)
    found = compare_tensors(one, other)
    assert not found.equal
    assert found.largest == (one.double() - other.double()).abs().max().item()
    assert found.relative == pytest.approx(((other - one).norm() / one.norm()).item(), rel=1e-6)
    assert compare_tensors(one, one.clone()).equal


def test_odd_tensors_are_compared():
    nan = torch.tensor([1.0, math.nan])
    assert compare_tensors(nan, nan.clone()).equal
    assert math.isnan(compare_tensors(nan, torch.ones(2)).largest)
    assert math.isnan(compare_tensors(torch.ones(2), nan.flip(0)).largest)
    assert compare_tensors(torch.tensor(1.0), torch.tensor(1.0)).equal
    assert compare_tensors(torch.empty(0), torch.empty(0)).equal
    assert compare_tensors(torch.zeros(3), torch.ones(3)).relative == math.inf
    assert compare_tensors(torch.zeros(3), -torch.zeros(3)).relative == 0
    assert not compare_tensors(torch.zeros(3), -torch.zeros(3)).equal


def test_what_is_no_number_stays_json(written, other):
    rewrite(other, lambda tensors: tensors[UP].fill_(math.nan))
    weights = compare(written, other)["weights"]
    assert weights["tensors"][UP] == {"largest": "nan", "relative": "nan"}
    json.dumps(weights, allow_nan=False)


def test_exit_codes_are_those_of_diff(written, other, tmp_path):
    assert "identical" in succeed("diff", written, other)
    rewrite(other, lambda tensors: tensors[UP].add_(1))
    ended = run("diff", written, other)
    assert ended.returncode == 1
    assert "tensors that differ most" in ended.stdout
    assert ended.stderr == ""
    as_json = run("diff", written, other, "--json")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["identical"] is False
    assert run("diff", written, tmp_path / "none").returncode == 2
    assert run("diff", written).returncode == 2


def test_a_damaged_side_is_one_clear_error(written, other):
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    message = fail("diff", written, other)
    assert message.startswith(f"error: {weights} is damaged")
    assert message.count("\n") == 1
