"""Drafts that transformers makes by itself, of a model alone: the prompt's own n-grams, or the model's first layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flextron_lit.generation.speculative import Speculated

LOOKUP = "prompt lookup"


@dataclass(frozen=True)
class StockDraft:
    """What drafts."""

    exit_layer: int | None = None
    """After how many layers the model itself drafts; None looks tokens up in what is there."""

    @property
    def name(self) -> str:
        return LOOKUP if self.exit_layer is None else f"early exit {self.exit_layer}"

    def settings(self, length: int) -> dict[str, Any]:
        """Of `generate`."""
        if self.exit_layer is None:
            return {"prompt_lookup_num_tokens": length}
        return {"assistant_early_exit": self.exit_layer}

    def __call__(
        self, model: PreTrainedModel, prompt: Tensor, length: int, confidence: float, **settings: Any
    ) -> Speculated:
        """Generate by transformers' own loop.

        Args:
            model: the full network.
            prompt: [1, T].
            length: most tokens of a draft.
            confidence: of an early exit, to go on; a lookup has none.
            settings: of `generate`.
        """
        given: Any = model
        with drafting(model, length, confidence), verifying(model) as passes:
            tokens = given.generate(prompt, attention_mask=torch.ones_like(prompt), **self.settings(length), **settings)
        drafted = passes[0] - prompt.shape[1] + sum(passes[1:]) - len(passes[1:])
        return Speculated(tokens, drafted, tokens.shape[1] - prompt.shape[1] - len(passes), len(passes))


@contextmanager
def drafting(model: PreTrainedModel, length: int, confidence: float) -> Iterator[None]:
    """Early exits ask the model's own generation config how they draft."""
    config: Any = model.generation_config
    wanted = {
        "num_assistant_tokens": length,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": confidence,
    }
    before = {name: getattr(config, name) for name in wanted}
    vars(config).update(wanted)
    try:
        yield
    finally:
        vars(config).update(before)


@contextmanager
def verifying(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each pass through all layers."""
    found: list[int] = []
    layers = model.config.num_hidden_layers

    def note(_: nn.Module, args: Any, given: Mapping[str, Any]) -> None:
        if model.config.num_hidden_layers == layers:
            found.append(given["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def stock_drafts(exits: list[int]) -> dict[str, StockDraft]:
    """A lookup, and an exit after each of these layers, by name."""
    made = [StockDraft(), *(StockDraft(layer) for layer in exits)]
    return {draft.name: draft for draft in made}
