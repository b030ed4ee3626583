"""What economize 0.3.2 has to compute less for some tokens, or no layers behind an exit, used as its authors use it.

Its techniques act outside `forward`, and know no packed documents: each document runs by itself through the library's
own runner, under the technique's own policy, every token subject to it (prompts too, as ours are).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import economize
import torch
from depth_cost import Request, products
from economize.techniques.dynamic_depth import (
    CalmConfig,
    FlexiDepthConfig,
    FlexiDepthObjective,
    GateSkipConfig,
    GateSkipObjective,
    MoDConfig,
    MoDObjective,
    MoDPolicy,
)
from economize.techniques.early_exit import EarlyExitConfig, EarlyExitKL, LayerSkip
from economize.techniques.layer_skip import SKIP_SEARCHES, LayerSkipConfig, SkipLayers, SkipScorer
from economize.train import Example, fit
from economize.train.data import collate
from economize.train.data.masks import loss_mask_from_labels
from torch import Tensor
from transformers import PreTrainedModel

from flextron_lit.commands.fit import best_precision
from flextron_lit.losses.cross_entropy import cross_entropy

Batch = Mapping[str, Tensor]
Document = tuple[Tensor, Tensor]
"""Tokens and labels, [1, T] each."""
Run = Callable[[Tensor], tuple[Tensor, float]]
"""A document's tokens to its logits [1, T, V], and to what its tokens take: a share of the full network's FLOPs."""
WARM_UP = 0.1
"""Share of the steps: the library's 100 steps are twice as many as there are."""
MOST = 1 - 1e-6
"""Of a threshold below 1."""
SHARED_RATE = 3e-4
"""Where all weights train, as the other rivals' do; the library's 2e-5 is for long runs."""


def documents(batches: Sequence[Batch]) -> list[Document]:
    """Packed blocks as what they are made of; what predicts nothing is left out."""
    found = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            positions = batch.get("position_ids")
            starts = [0] if positions is None else (positions[row] == 0).nonzero().flatten().tolist()
            for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
                if end - first > 1:
                    found.append((ids[None, first:end], labels[None, first:end]))
    return found


@torch.no_grad()
def measured(run: Run, pieces: Sequence[Document]) -> tuple[float, float]:
    """Nats per predicted token, and the mean share of FLOPs over all tokens."""
    total, predicted, cost, tokens = 0.0, 0, 0.0, 0
    for ids, labels in pieces:
        logits, share = run(ids)
        loss, count = cross_entropy(logits, labels)
        total, predicted = total + loss.item(), predicted + int(count)
        cost, tokens = cost + share * ids.numel(), tokens + ids.numel()
    return total / predicted, cost / tokens


class Forward:
    """The library's own pass over a document."""

    def __init__(self, efficient: Any) -> None:
        self.runner = efficient.runner

    def context(self, ids: Tensor) -> Any:
        return self.runner.context(
            self.runner.new_cache(ids.shape[1], 1), torch.arange(ids.shape[1]), None, trusted=True
        )

    def logits(self, ids: Tensor, policy: Any) -> Tensor:
        return self.runner.logits(self.runner.forward(ids, self.context(ids), policy=policy).final)


class ShiftedMoD(MoDPolicy):
    """Mixture-of-Depths whose tokens run above a logit that is not 0.

    After so few steps the predictor does not know the capacity that it was trained for.
    """

    threshold = 0.0

    def select(self, index: int, score: Tensor, valid: Tensor) -> Tensor:
        return score > self.threshold


@dataclass(frozen=True)
class Way:
    """A technique that chooses layers for every token by a threshold."""

    config: Callable[[Request, float], Any]
    """Of the share of FLOPs that is wanted."""
    objective: Callable[[Request, float], Any] | None
    """What it is trained by; None where there is nothing to train."""
    again: bool
    """Whether it is trained anew for every share."""
    about: str


def capacity(request: Request, layers: Sequence[int], target: float) -> float:
    """Share of the tokens that may run each of some layers (from 1) so that a request takes a share."""
    chosen = torch.zeros(len(request.layers))
    chosen[[layer - 1 for layer in layers]] = 1
    none, whole = request.share(1 - chosen, chosen), 1.0
    return min(max((target - none) / (whole - none), 0.01), 1.0)


def every_second(request: Request) -> tuple[int, ...]:
    return tuple(range(2, len(request.layers) + 1, 2))


def every(request: Request) -> tuple[int, ...]:
    return tuple(range(1, len(request.layers) + 1))


WAYS = {
    "economize, Mixture-of-Depths": Way(
        lambda request, target: MoDConfig(capacity=capacity(request, every_second(request), target)),
        lambda request, target: MoDObjective(),
        True,
        "every second layer, routers alone trained; their threshold moved from 0 too",
    ),
    "economize, GateSkip": Way(
        lambda request, target: GateSkipConfig(),
        lambda request, target: GateSkipObjective(final_budget=capacity(request, every(request), target)),
        False,
        "one gate a layer, gates alone trained",
    ),
    "economize, FlexiDepth": Way(
        lambda request, target: FlexiDepthConfig(),
        lambda request, target: FlexiDepthObjective(),
        False,
        "the second half of the layers, routers and adapters trained",
    ),
    "economize, CALM (state)": Way(
        lambda request, target: CalmConfig(confidence="state"),
        None,
        False,
        "a token exits where a layer hardly turns it; no training",
    ),
}


class Routed:
    """A network whose tokens choose their layers."""

    def __init__(self, efficient: Any, name: str, request: Request) -> None:
        self.technique, self.forward, self.request = efficient.techniques[name], Forward(efficient), request
        self.price = 0.0

    def policy(self) -> Any:
        """The technique's, so that fewer tokens run a layer as the price rises."""
        name, config = self.technique.name, self.technique.config
        if name == MoDConfig.technique:
            made = ShiftedMoD(self.technique)
            made.threshold = self.price
            return made
        # of CALM, tokens above it stop
        logit = -self.price if name == CalmConfig.technique else self.price
        value = float(torch.tensor(logit).sigmoid().clamp(0, MOST))
        self.technique.config = replace(config, threshold=value)
        return self.technique.make_policy()

    def __call__(self, ids: Tensor) -> tuple[Tensor, float]:
        policy = self.policy()
        logits = self.forward.logits(ids, policy)
        entered, ran, filled = policy.meter.per_layer().T / ids.numel()
        assert bool((entered == 1).all()), "every token enters every layer"
        return logits, self.request.share(ran, filled, self.beside(1 - ran))

    def beside(self, skipped: Tensor) -> float:
        """FLOPs of a token for what chooses, and for what stands in the place of the layers that it skips."""
        routers = getattr(self.technique, "routers", None) or getattr(self.technique, "gates", None) or {}
        adapters = getattr(self.technique, "adapters", None) or {}
        instead = sum(products(adapter) * float(skipped[int(layer) - 1]) for layer, adapter in adapters.items())
        return sum(products(router) for router in routers.values()) + instead


class Exiting:
    """A network that ends after some layers, for all tokens."""

    def __init__(self, efficient: Any, request: Request) -> None:
        self.technique, self.forward = efficient.techniques[EarlyExitConfig.technique], Forward(efficient)
        self.share = request.of_layers(self.technique.exit_layer)
        if self.technique.readout is not None:
            # as logits are, it is computed where a token is to be predicted
            readouts = products(self.technique.readout) * request.workload.generated_tokens
            self.share += readouts / request.table.full

    def __call__(self, ids: Tensor) -> tuple[Tensor, float]:
        runner, context = self.forward.runner, self.forward.context(ids)
        return self.technique.logits(self.technique.run(runner, runner.embed(ids, context), context)), self.share


class Skipping:
    """A network without some layers (from 1), for all tokens."""

    def __init__(self, efficient: Any, layers: Sequence[int], request: Request) -> None:
        self.forward, self.layers = Forward(efficient), tuple(layers)
        self.share = request.of_layers(len(request.layers) - len(layers))

    def __call__(self, ids: Tensor) -> tuple[Tensor, float]:
        return self.forward.logits(ids, SkipLayers(self.layers)), self.share


def attached(model: PreTrainedModel, config: Any) -> Any:
    """A technique on a copy."""
    own: Any = copy.deepcopy(model)
    return economize.apply(own.requires_grad_(True), config)


def train(efficient: Any, objective: Any, batches: Sequence[Batch], rate: float | None = None) -> dict[str, Any]:
    """A step a batch, by the library's own loop and settings but for what so few steps ask for; what was done."""
    rows = [
        collate([Example(ids[0], loss_mask_from_labels(labels[0])) for ids, labels in documents([batch])])
        for batch in batches
    ]
    mixed = "bfloat16" if best_precision() == "bf16-mixed" else None
    warm, tokens = math.ceil(WARM_UP * len(rows)), sum(batch["input_ids"].numel() for batch in batches)
    found = fit(
        efficient, rows, objective, steps=len(rows), warmup_steps=warm, autocast=mixed, seed=0, lr=rate, log_every=10
    )
    losses = [found.losses[0], found.losses[-1]]
    return {"steps": len(rows), "tokens": tokens, "learning_rate": rate or objective.defaults.lr, "losses": losses}


def readout(exit_layer: int) -> tuple[Any, Any]:
    """Config and objective of an exit with an adapter before the head, which alone is trained."""
    return EarlyExitConfig(exit_layer, head="readout"), EarlyExitKL()


def shared(exit_layer: int) -> Any:
    """Config of an exit that the model's own head reads."""
    return EarlyExitConfig(exit_layer, head="shared")


def layer_skip_training(exits: Sequence[int]) -> Any:
    """LayerSkip's objective: layer dropout, and a loss at all these exits in every step."""
    return LayerSkip(exit_layers=tuple(exits), curriculum="none")


def skipped_first(efficient: Any, blocks: Sequence[Tensor], count: int) -> list[int]:
    """Layers (from 1) in the order in which the library's greedy search leaves them out."""
    search = SKIP_SEARCHES.get("greedy")()
    layers = efficient.adapter.num_layers
    candidates = LayerSkipConfig(num_skip=count).candidates(layers)
    search(SkipScorer(efficient.runner, list(blocks), "kl"), candidates, count)
    return [layer for layer, _ in search.trace]
