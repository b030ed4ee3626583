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


def test_gradients_are_reduced_once_a_step_also_when_blocks_are_skipped(notes):
    for rank in notes:
        for step in rank[:-1]:
            assert [2, 0, 0, 3, 1, 0] in step["plan"]
            assert step["reductions"] == 1
            assert step["parameters_reduced"] == step["parameters"]
