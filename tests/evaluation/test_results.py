import csv
import json

import pytest

from flextron_lit.evaluation.results import CSV, Results

MADE = {"command": "one", "seed": 0, "git_commit": "a", "checkpoint": "ab", "dtype": "float32"}
TASK = {"task": "owls", "network": "full", "budget": None, "limit": 3, "sub_network": [1], "costs": {}}
SCORES = {"owls": {"acc": 0.5, "acc_stderr": 0.1, "questions": 3}}


def task(**differences):
    return {**TASK, "scores": SCORES, "made": MADE, **differences}


@pytest.fixture
def results(tmp_path):
    made = Results(tmp_path, "ab")
    made.add_task(task())
    return made


def test_what_is_finished_is_found_again(results):
    found = Results.read(results.folder, "ab", fresh=False)
    assert found == results
    assert found.known_task(TASK, {**MADE, "command": "two", "git_commit": "b", "seed": 5}) == task()
    assert found.known_task({**TASK, "limit": 4}, MADE) is None
    assert found.known_task({**TASK, "network": "static"}, MADE) is None
    assert found.known_task({**TASK, "sub_network": [0]}, MADE) is None
    assert found.known_task(TASK, {**MADE, "dtype": "bfloat16"}) is None
    assert Results.read(results.folder, "ab", fresh=True).tasks == []


def test_a_task_that_ran_again_replaces_the_row(results):
    results.add_task(task(seconds=1.0))
    results.add_task(task(limit=None))
    assert results.tasks == [task(seconds=1.0), task(limit=None)]


def test_losses_are_known_by_what_was_asked_and_how(results):
    assert results.known_losses(MADE, {"budgets": ["0.6"]}) is None
    results.losses = {"made": MADE, "asked": {"budgets": ["0.6"]}, "rows": []}
    assert results.known_losses({**MADE, "command": "two"}, {"budgets": ["0.6"]}) == []
    assert results.known_losses(MADE, {"budgets": ["0.7"]}) is None
    assert results.known_losses({**MADE, "dtype": "bfloat16"}, {"budgets": ["0.6"]}) is None


def test_the_csv_has_tasks_beside_losses(results):
    with (results.folder / CSV).open() as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "network": "full",
        "budget": "",
        "cost": "1.0",
        "text": "owls",
        "documents": "3",
        "acc": "0.5",
        "acc_stderr": "0.1",
    }


def test_a_file_of_another_checkpoint_is_no_answer(results):
    with pytest.raises(ValueError, match=r"of another checkpoint, .* \(ab, now cd\); name another --output"):
        Results.read(results.folder, "cd", fresh=False)


def test_a_damaged_file_is_named(results):
    for content in ("{", json.dumps({"checkpoint": "ab"}), "[]"):
        results.path.write_text(content)
        with pytest.raises(ValueError, match=r"evaluation.json is damaged .* start anew with --fresh"):
            Results.read(results.folder, "ab", fresh=False)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write the results to .*below"):
        Results(tmp_path / "file" / "below", "ab").write()
