"""What an earlier release wrote is read by this one: a config, an unfinished run, a checkpoint with routers.

`earlier/` was written by commit 664c195, before the code moved into rooms: `run.yaml` (its config), `run/` (that run,
stopped by SIGTERM after 6 of 12 steps) and `flextron/` (elastic training, surrogate, static and dynamic router).
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from flextron_lit import FlextronModel, checkpoint
from tests.front_door import fail, succeed
from tests.runs import table

EARLIER = Path(__file__).parent / "earlier"
ANSWER = [1, 2, 0, 0]
"""What `select --budget flops=0.9` of that commit answered."""


@pytest.fixture
def run_folder(tmp_path):
    return Path(shutil.copytree(EARLIER / "run", tmp_path / "run"))


def fit(folder):
    return ("fit", "-c", EARLIER / "run.yaml", "--run_folder", folder)


def test_an_unfinished_run_goes_on_where_it_stopped(run_folder):
    before = (run_folder / "config.yaml").read_text()
    assert "class_path: callbacks.BudgetSampling" in before
    said = succeed(*fit(run_folder))
    assert "finished" in said
    # the rows of step 0 are those that the earlier release wrote, and nothing was logged twice
    kept = json.loads((EARLIER / "run" / "training.json").read_text())
    assert [row for row in table(run_folder) if row["step"] == 0] == kept
    assert {row["step"] for row in table(run_folder)} == {0, 12}
    assert checkpoint.read(run_folder / "flextron").history[-1]["steps"] == 12


def test_a_key_that_it_lacks_is_no_other_config(run_folder):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    del config["model"]["init_args"]["accumulate"]
    (run_folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert "finished" in succeed(*fit(run_folder))
    assert checkpoint.read(run_folder / "flextron").history[-1]["steps"] == 12


def test_another_value_still_is(run_folder):
    said = fail(*fit(run_folder), "--model.init_args.clip_norm", "2")
    assert "model.init_args.clip_norm: 1.0 -> 2.0" in said
    assert "callbacks" not in said


def test_a_checkpoint_answers_as_it_did_and_exports(tmp_path):
    folder = EARLIER / "flextron"
    checkpoint.verify(folder)
    answered = json.loads(succeed("select", "--checkpoint", folder, "--budget", "flops=0.9", "--json"))
    assert answered["sub_network"] == ANSWER
    succeed(
        "export",
        "--checkpoint",
        folder,
        "--budget",
        "flops=0.9",
        "--format",
        "remote-code",
        "--output",
        tmp_path / "small",
    )
    model = FlextronModel.from_pretrained(folder)
    model.set_budget("flops=0.9")
    tokens = torch.arange(1, 20)[None]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert torch.allclose(small(tokens).logits, model(tokens).logits, atol=1e-5)
    # the control: at full width it is another network
    model.set_budget(1.0)
    assert not torch.allclose(small(tokens).logits, model(tokens).logits, atol=1e-5)


def test_its_dynamic_router_routes():
    model = FlextronModel.from_pretrained(EARLIER / "flextron")
    tokens = torch.arange(1, 20)[None]
    full = model(tokens).logits
    model.set_budget(0.9, dynamic=True)
    assert not torch.equal(model(tokens).logits, full)
