"""Tasks of the LM evaluation harness (EleutherAI) on one set of weights within several budgets.

Needs `requirements-eval.txt`; nothing else imports this module at its top.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lm_eval.tasks
from lm_eval import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from flextron_lit.data.encoding import Ends
from flextron_lit.elastic.selection import Selection
from flextron_lit.evaluation.offline_tasks import OFFLINE, write_tasks
from flextron_lit.files.ranks import tell
from flextron_lit.model import FlextronModel
from flextron_lit.routers.dynamic import DynamicPolicy

HARNESS_TASKS = Path(lm_eval.tasks.__file__).parent
FEWSHOT_SEED = 1234
"""As the harness's own command has it."""
RESAMPLED = 100
"""Resamplings for the errors of metrics that are no plain mean."""
EXPECTED = ("`pretrained` model kwarg is not of type `str`", "Passed an already-initialized model")
"""What the harness warns of whenever a model in memory is evaluated."""


class BudgetedLM(HFLM):  # type: ignore[misc,unused-ignore]  # an Any where the harness is not installed
    """The harness's own class for Hugging Face models around a live network whose selection is switched.

    Args:
        model: the elastic network.
        batch_size: requests at once.
    """

    def __init__(self, model: FlextronModel, batch_size: int) -> None:
        logging.getLogger(HFLM.__module__).addFilter(lambda record: not record.getMessage().startswith(EXPECTED))
        # sums of many log-probabilities: bfloat16 has too few digits for them
        settings = {"backend": "causal", "batch_size": batch_size, "softmax_dtype": "float32"}
        super().__init__(pretrained=model, tokenizer=model.tokenizer, **settings)
        self.asked_batch_size = batch_size
        self.ends = Ends.of(model.tokenizer) if model.flextron.special_tokens else Ends()
        """What texts of the network begin with: requests do so too, and end open."""
        self._rolling = False

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from."""
        return self.ends.prefix[-1] if self.ends.prefix else int(super().prefix_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """A request, or without special tokens a part of one, which begins as texts of the network do, once."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        begun = ids if add_special_tokens is False or self._rolling else self.ends.begun(ids)
        return begun[-left_truncate_len:] if left_truncate_len else begun

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Requests to go on from, [B, T] each: token ids, and which are no padding."""
        ids = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        made = self.tokenizer.pad({"input_ids": ids}, padding_side=padding_side, return_tensors="pt")
        return made["input_ids"], made["attention_mask"]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts; the harness itself puts the prefix token before them."""
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self._rolling = False

    @contextmanager
    def within(self, selection: Selection) -> Iterator[None]:
        """Make a selection active. A policy gets one request at a time.

        The harness pads without a mask, and a policy would give widths to padding, and count it as tokens.
        """
        self.batch_size_per_gpu = 1 if isinstance(selection, DynamicPolicy) else self.asked_batch_size
        with self._model.use(selection):
            yield


@dataclass(frozen=True)
class LoadedTask:
    """A task, group or tag with its data."""

    name: str
    """As it was asked for."""
    loaded: Mapping[str, Any]
    """As the harness has it."""

    @classmethod
    def load(cls, name: str, include_path: Path | None) -> LoadedTask:
        """Find it and its data.

        Args:
            name: one of ours (`OFFLINE`), of the include path, or of the harness.
            include_path: a folder of further task files.

        Raises:
            ValueError: if there is none of that name, its file is faulty, or its data cannot be had.
        """
        with TemporaryDirectory() as folder:
            own = [str(include_path)] if include_path else []
            if name in OFFLINE:
                write_tasks([name], HARNESS_TASKS, Path(folder))
                own.append(folder)
            manager = TaskManager(include_path=own, include_defaults=False)
            if name not in manager.all_tasks:
                tell(f"looking for the task {name} among those of the harness, thousands of files")
                manager = TaskManager(include_path=own)
            if name not in manager.all_tasks:
                raise ValueError(
                    f"there is no task {name!r}; {', '.join(OFFLINE)} are always there, `lm_eval ls tasks` lists the "
                    "harness's, and --include_path names a folder of others"
                )
            return cls(name, _loaded(manager, name))

    def scores(self, lm: HFLM, limit: int | None) -> dict[str, dict[str, Any]]:
        """What a network scores within the selection that is active.

        Args:
            lm: the network.
            limit: questions of each task; None means all.

        Returns:
            By task and metric the value and its standard error; `questions` says of how many.
        """
        found = evaluate(lm=lm, task_dict=self.loaded, limit=limit, bootstrap_iters=RESAMPLED, log_samples=False)
        assert found is not None, "one process evaluates"
        asked = found["n-samples"]
        named = {**found["results"], **found.get("groups", {})}
        return {task: {**_numbers(of), "questions": asked.get(task, {}).get("effective")} for task, of in named.items()}


def _loaded(manager: TaskManager, name: str) -> Mapping[str, Any]:
    try:
        loaded: Mapping[str, Any] = manager.load([name])
    except Exception as error:
        # no network, no such data set, a faulty file: each its own type, all the user's to mend
        told = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"cannot load the task {name}: {type(error).__name__}: {told}; without a network take one of "
            f"{', '.join(OFFLINE)}, or task files of local data with --include_path"
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """The metrics by name, without the `,none` that says that nothing was filtered."""
    numbers = {key: value for key, value in results.items() if "," in key and isinstance(value, float | int)}
    return {key.removesuffix(",none"): float(value) for key, value in numbers.items()}
