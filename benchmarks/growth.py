"""How time grows with depth, width, length and number of choices: exponents over four sizes of one, the others fixed.

    OMP_NUM_THREADS=1 python benchmarks/growth.py

Small Llamas with random weights, fp32. Of one dimension all sizes are timed in turns with the smallest, and the
exponent is the slope of a straight line through the logarithms. So small networks spend much on what does not grow:
these exponents are of these sizes, and large networks come nearer to what the operations say. What `--results` has is
not measured again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import first_look
from kept_results import Kept

from flextron_lit.costs import COUNTED, Workload
from flextron_lit.costs import sub_network_sampling as sampling
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.kv_cache import retract
from flextron_lit.elastic.reconstruction import prepare, reconstruct
from flextron_lit.latency.timing import interleaved, seconds
from flextron_lit.losses.by_chunk import Predictions, losses
from flextron_lit.routers.from_budget import Routing
from flextron_lit.routers.from_surrogate import BUDGETS_A_STEP, HIDDEN, LEARNING_RATE
from flextron_lit.routers.objective import CostPenalty, route
from flextron_lit.routers.pairs import Pairs
from flextron_lit.routers.static import StaticRouter
from flextron_lit.routers.surrogate import Surrogate
from flextron_lit.routers.trained import TrainedSurrogate
from flextron_lit.sources.stock import from_config
from flextron_lit.space import SpaceConfig, width_ratios

RESULTS = Path("benchmarks/results/growth.json")
QUICK = {"sizes": 2, "rounds": 1, "results": Path("build/quick/growth.json")}
"""Settings of a first look."""
VOCABULARY = 2048
HEADS, KV_GROUPS = 8, 4
BLOCKS = 8
"""Of calibration text, each as long as the length says."""
DECODED = 8
"""Tokens of a sample, which is to be longer than other programs' turns."""
PAIRS, SURROGATE_HIDDEN = 256, 128
BUDGET = "flops=0.7"
Run = Callable[[], Any]


@dataclass(frozen=True)
class Size:
    """A network, and what it reads."""

    depth: int = 4
    """Layers."""
    width: int = 256
    """Hidden size; an MLP has four times as many neurons."""
    length: int = 256
    """Tokens of a block, and in the cache before a decoded token."""
    choices: int = 4
    """Widths of an MLP; attention has one for each KV group."""


SIZES = {
    "depth": [2, 4, 8, 16],
    "width": [64, 128, 256, 512],
    "length": [128, 256, 512, 1024],
    "choices": [2, 4, 8, 16],
}


class Network:
    """A network of a size, with what is timed of it."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.size = size
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.depth,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_GROUPS,
            max_position_embeddings=2 * max(SIZES["length"]),
        )
        shares = [(index + 1) / size.choices for index in range(size.choices)]
        self.backbone = ElasticBackbone(from_config(config).eval(), SpaceConfig(mlp=shares))
        prepare(self.backbone, "own")
        self.ids = torch.randint(VOCABULARY, (BLOCKS, size.length))
        self.generator = torch.Generator().manual_seed(0)
        self.table = COUNTED["flops"](self.backbone, Workload())

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.backbone.model.parameters(), lr=1e-5, weight_decay=0.0)

    def elastic_step(self) -> None:
        """A training step as the elastic stage runs it: the full network, and one that is distilled from it."""
        backbone, space, ids = self.backbone, self.backbone.space, self.ids[:1]
        with backbone.use(space.full()):
            full = Predictions.of(backbone.model, {"input_ids": ids})
            full_loss, _ = losses(full, ids, {})
        with backbone.use(space.uniform(mlp=0.5, attention=0.5)):
            language, distilled = losses(
                Predictions.of(backbone.model, {"input_ids": ids}), ids, {"full": full.detach()}
            )
            (language + distilled["full"]).backward()
        with backbone.use(space.full()):
            full_loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @cached_property
    def filled(self) -> Any:
        """A KV cache of as many tokens as the length says."""
        cache: Any = DynamicCache(config=self.backbone.model.config)
        with torch.inference_mode():
            self.backbone.model(self.ids[:1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    @torch.inference_mode()
    def decoded_tokens(self) -> None:
        """Tokens of the full network, each behind the same ones."""
        for _ in range(DECODED):
            self.backbone.model(self.ids[:1, :1], past_key_values=self.filled, use_cache=True)
            retract(self.filled, 1)

    def conversion(self) -> None:
        """The pass over calibration text, with the order and the projections of every layer."""
        reconstruct(self.backbone, {"input_ids": self.ids}, None, "own")

    @cached_property
    def surrogate(self) -> TrainedSurrogate:
        """One that has learned that narrow widths lose, some blocks more than others."""
        space = self.backbone.space
        network = Surrogate(space, SURROGATE_HIDDEN, self.generator)
        effects = torch.rand(len(space), 1, generator=self.generator) * (1 - width_ratios(space)).square()
        drawn = [space.random(self.generator) for _ in range(PAIRS)]
        one_hot = torch.stack([space.one_hot(each) for each in drawn])
        lost = (one_hot * effects).sum((-2, -1))
        network.start(one_hot, lost)
        return TrainedSurrogate(network.requires_grad_(False), "loss", 0.0, Pairs.of(drawn, lost.tolist()), {})

    @cached_property
    def routing(self) -> Routing:
        return Routing(self.backbone.space, {self.table.name: self.table}, {}, self.surrogate)

    def budget_answer(self) -> None:
        """A search by the surrogate."""
        self.routing.answer(self.routing.parse(BUDGET))

    @cached_property
    def router(self) -> tuple[StaticRouter, torch.optim.Optimizer]:
        router = StaticRouter(self.backbone.space, HIDDEN, self.generator)
        router.scale_to(self.table)
        return router, torch.optim.Adam(router.parameters(), lr=LEARNING_RATE)

    def router_step(self) -> None:
        """A static router's, through the surrogate."""
        router, optimizer = self.router
        network = self.surrogate.network
        budgets = torch.tensor(sampling.budgets(self.table.smallest_ratio, BUDGETS_A_STEP, self.generator))
        routed = route(router, budgets, self.generator, 1.0)
        predicted = (network(routed.probabilities) - network.centre) / network.scale
        loss = predicted.mean() + CostPenalty().of(routed.ratios(self.table), routed.budgets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


OPERATIONS: dict[str, Callable[[Network], Run]] = {
    "training step": lambda network: network.elastic_step,
    f"{DECODED} decoded tokens": lambda network: network.decoded_tokens,
    "conversion": lambda network: network.conversion,
    "answer to a budget": lambda network: network.budget_answer,
    "router's training step": lambda network: network.router_step,
}
WITHOUT_TEXT = {"answer to a budget", "router's training step"}
"""They read none, so its length is nothing to them."""


def measured(networks: Mapping[int, Network], operation: str, rounds: int) -> dict[str, Any]:
    """Times of all sizes in turns with the smallest, and the exponent."""
    runs = {size: OPERATIONS[operation](network) for size, network in networks.items()}
    for run in runs.values():
        # what is made at the first call
        run()
    smallest = runs[min(runs)]
    found = interleaved(runs, smallest, range(rounds), partial(seconds, device=torch.device("cpu")))
    ratios = [found.ratios[size].value for size in runs]
    return {
        "sizes": list(runs),
        "ratios": ratios,
        "spreads": [found.ratios[size].spread for size in runs],
        "seconds": [found.reference * ratio for ratio in ratios],
        "rounds": rounds,
        "exponent": exponent(list(runs), ratios),
    }


def exponent(sizes: Sequence[int], times: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms, by least squares."""
    return float(np.polyfit([math.log(size) for size in sizes], [math.log(time) for time in times], 1)[0])


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    kept = Kept(options.results)
    for dimension in options.dimensions:
        sizes, networks = SIZES[dimension][: options.sizes], {}
        for operation in options.operations:
            cell = f"{operation}, {dimension}"
            if dimension == "length" and operation in WITHOUT_TEXT:
                continue
            if cell not in kept.kept.get("growth", {}) and not networks:
                networks = {size: Network(replace(Size(), **{dimension: size})) for size in sizes}
            row = kept.keep("growth", cell, partial(measured, networks, operation, options.rounds))
            times = ", ".join(f"{size}: {time:.4f} s" for size, time in zip(row["sizes"], row["seconds"], strict=True))
            print(f"{cell}: {row['exponent']:.2f} ({times})", flush=True)


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dimensions", nargs="+", choices=list(SIZES), default=list(SIZES))
    made.add_argument("--operations", nargs="+", choices=list(OPERATIONS), default=list(OPERATIONS))
    made.add_argument("--sizes", type=int, default=4, help="of each dimension, the smallest first")
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--results", type=Path, default=RESULTS)
    return first_look.parsed(made, QUICK, "two sizes, one round, elsewhere")


if __name__ == "__main__":
    main()
