"""What dense models take for a request relative to the original, and which sizes take a wanted share of its time.

Each is timed in turns with the original. Sizes are neurons of every layer, or layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from rival_ways import Kind
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from flextron_lit.costs import Workload
from flextron_lit.elastic.kv_cache import retract
from flextron_lit.latency.timing import interleaved, seconds
from flextron_lit.planning.asked import Shape
from flextron_lit.sources.stock import from_config
from flextron_lit.space import SpaceConfig

ROUNDS = {"prefill": 10, "decode": 60}
"""With a fifth of the decoded tokens two measurements of one network were 0.03 apart."""
STEPS = 4
"""Decoded tokens of a sample, which is to be longer than other programs' turns."""
FIRST_LOOK = {"mlp": 0.33, "depth": 0.55}
"""Share of the full size that is measured first."""
NEAR = 0.01
"""A latency so near to the wanted one is taken as equal, where sizes are fine enough."""


def passes(model: PreTrainedModel, workload: Workload) -> Mapping[str, Callable[[], None]]:
    """A prompt, and tokens half-way through an answer, as generation runs them."""
    prompt = torch.ones(1, workload.prompt_tokens, dtype=torch.long)
    half_way = torch.ones(1, round(workload.decode_context) - 1, dtype=torch.long)
    kept: Any = DynamicCache(config=model.config)
    run: Any = torch.inference_mode()(model.forward)
    run(input_ids=half_way, past_key_values=kept, use_cache=True, logits_to_keep=1)

    def prefill() -> None:
        run(input_ids=prompt, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    def decode() -> None:
        for _ in range(STEPS):
            run(input_ids=prompt[:, :1], past_key_values=kept, use_cache=True)
            retract(kept, 1)

    return {"prefill": prefill, "decode": decode}


def ratio(small: PreTrainedModel, full: PreTrainedModel, workload: Workload) -> dict[str, float]:
    """`latency` of the request and of its passes, relative to the full model's, and half the 95 % interval's width."""
    mine, reference = passes(small, workload), passes(full, workload)
    clock = partial(seconds, device=torch.device("cpu"))
    found = {
        phase: interleaved({"small": mine[phase]}, reference[phase], range(rounds), clock)
        for phase, rounds in ROUNDS.items()
    }
    times = {"prefill": found["prefill"].reference, "decode": found["decode"].reference / STEPS}
    values = {phase: each.ratios["small"].value for phase, each in found.items()}
    spreads = {phase: each.ratios["small"].spread for phase, each in found.items()}
    return {
        "latency": workload.of_request(times, values),
        "spread": workload.of_request(times, spreads),
        **values,
    }


def shaped(config: PreTrainedConfig, kind: Kind, size: int) -> PreTrainedModel:
    """A model of a size, with random weights."""
    small = copy.deepcopy(config)
    if kind == "mlp":
        small.intermediate_size = size
    else:
        small = Shape(config, SpaceConfig()).with_layers(size).config
    return from_config(small).eval()


def sizes(
    full: PreTrainedModel, kind: Kind, targets: list[float], measure: Callable[[PreTrainedModel], dict[str, float]]
) -> dict[str, dict[str, float]]:
    """For each wanted latency the size whose measured one is nearest, and what was measured.

    Latency is all but linear in either size: each target is looked up between what was measured, measured there, and
    once more between the nearer ones if it was missed.
    """
    whole = full.config.intermediate_size if kind == "mlp" else full.config.num_hidden_layers
    step = 8 if kind == "mlp" else 1
    known: dict[int, dict[str, float]] = {}

    def look(size: int) -> None:
        if size not in known and size != whole:
            known[size] = measure(shaped(full.config, kind, size))
            print(f"{kind} {size}: {known[size]['latency']:.3f}", flush=True)

    def between(target: float) -> int:
        points = sorted([(each["latency"], size) for size, each in known.items()] + [(1.0, whole)])
        latencies, at = zip(*points, strict=True)
        if target < latencies[0]:
            slope = (at[1] - at[0]) / (latencies[1] - latencies[0])
            found = at[0] + slope * (target - latencies[0])
        else:
            found = np.interp(target, latencies, at)
        return max(step, round(found / step) * step)

    def nearest(target: float) -> int:
        return min(known, key=lambda size: abs(known[size]["latency"] - target))

    look(round(FIRST_LOOK[kind] * whole / step) * step)
    for target in targets:
        for _ in range(2):
            if abs(known[nearest(target)]["latency"] - target) > NEAR:
                look(between(target))
    return {str(target): {"size": nearest(target), **known[nearest(target)]} for target in targets}
