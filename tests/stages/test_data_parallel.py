import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.front_door import ENVIRONMENT, ROOT


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).parent / "two_processes.py"
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_ranks_agree_though_they_see_different_text(notes):
    *steps, last = notes[0]
    assert len(steps) == 3
    assert all(step["gradients_equal"] and step["gradient_norm"] > 0 for step in steps)
    assert last == {"weights_equal": True}
    assert not any(step["batches_equal"] for step in steps)


def test_what_narrower_widths_have_of_their_own_is_reduced_where_it_was_drawn(notes):
    kinds = ("self_attn", "mlp")
    for step in notes[0][:-1]:
        assert step["drawn_equal"]
        narrower = {(block, choice) for plan in step["plan"] for block, choice in enumerate(plan)}
        widths = {"self_attn": (0, 1, 2, 4), "mlp": (0, 32, 64, 128)}
        wanted = {
            f"model.layers.{block // 2}.{kinds[block % 2]}.compensation.projections.{widths[kinds[block % 2]][choice]}"
            for block, choice in narrower
            if 0 < choice < 3
        }
        # the first layer's attention cannot be skipped: its choices are one further on
        assert {name for name in step["drawn"] if "layers.0.self_attn" not in name} == {
            name for name in wanted if "layers.0.self_attn" not in name
        }
        assert wanted


def test_two_processes_learn_what_one_would(notes):
    for rank in notes:
        for step in rank[:-1]:
            assert step["one_process"] < 1e-5
            assert step["one_process_own"] < 1e-5
            # the control: gradients of one rank's text alone are others
            assert step["other_text"] > 1e-4


def test_gradients_are_reduced_once_a_step_also_when_blocks_are_skipped(notes):
    for rank in notes:
        for step in rank[:-1]:
            assert [2, 0, 0, 3, 1, 0] in step["plan"]
            assert step["reductions"] == 1
            assert step["parameters_reduced"] == step["parameters"]
