"""Time of the elastic network and its sub-networks relative to dense, extracted and stock ones, interleaved.

    python benchmarks/speed.py

The weights are random in the shape of SmolLM2-135M: speed does not depend on their values. On a shared machine only
ratios within one run mean something, so each round times every variant once, and medians over rounds are compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from shapes import SMOLLM2_135M

from flextron_lit.costs import COUNTED, Workload
from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.latency.device import device_description

HALF_WIDTHS = {"intermediate_size": 768, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
DENSE, FULL, HALF, EXTRACTED, STOCK = "dense", "full width", "half", "half, extracted", "stock model of half's widths"
LEGEND = "half: half of each MLP and 2 of 3 KV groups"
KINDS = {
    "forward": ("forward", 1),
    "forward + backward": ("forward_backward", 1),
    "one token with a cache": ("token", 6),
}
"""What is timed: method, and rounds as a multiple of those asked for."""
COMPARISONS = [
    ("forward", FULL, DENSE, 1.02),
    ("forward + backward", FULL, DENSE, 1.02),
    ("one token with a cache", FULL, DENSE, None),
    ("forward", HALF, DENSE, 0.69),
    ("forward + backward", HALF, DENSE, 0.70),
    ("one token with a cache", HALF, DENSE, 0.74),
    ("forward", EXTRACTED, STOCK, 1.03),
    ("one token with a cache", EXTRACTED, STOCK, 1.03),
    ("forward", HALF, EXTRACTED, 1.05),
    ("forward + backward", HALF, EXTRACTED, None),
    ("one token with a cache", HALF, EXTRACTED, 1.05),
]
"""Kind, variant, reference, and the limit of their ratio."""
FIRST_TOKEN_LIMIT = 1.02
FLOP_SHARE_LIMIT = 1.08
SWITCH_LIMIT = 0.05

Run = Callable[[], Any]


def seconds(run: Run) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median seconds of each run; the order turns from round to round, so that none always follows another."""
    for run in runs.values():
        run()
    names, times = list(runs), {name: [] for name in runs}
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(seconds(runs[name]))
    return {name: median(values) for name, values in times.items()}


class Variant:
    """A model under one selection."""

    def __init__(self, model: LlamaForCausalLM, use: Callable[[], Any], ids: Tensor) -> None:
        self.model, self.use, self.ids = model, use, ids
        self.cache = DynamicCache(config=model.config)
        with use(), torch.no_grad():
            model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def forward(self) -> None:
        with self.use(), torch.no_grad():
            self.model(self.ids, use_cache=False)

    def forward_backward(self) -> None:
        with self.use():
            self.model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.model.zero_grad()

    def token(self) -> None:
        with self.use():
            self.next_token()

    def next_token(self) -> None:
        with torch.no_grad():
            self.model(self.ids[:, -1:], past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)


def variants(tokens: int) -> tuple[ElasticBackbone, dict[str, Variant]]:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval()
    # the same weights, so that both read the same memory
    backbone = ElasticBackbone(LlamaForCausalLM(dense.config).eval())
    for (name, parameter), source in zip(backbone.model.named_parameters(), dense.parameters(), strict=True):
        module, _, leaf = name.rpartition(".")
        assert parameter.shape == source.shape
        setattr(backbone.model.get_submodule(module), leaf, source)
    backbone.model.tie_weights()
    half = backbone.space.uniform(mlp=0.5, attention=0.67)
    extracted = extract(backbone, half)
    stock = LlamaForCausalLM(LlamaConfig(**(SMOLLM2_135M | HALF_WIDTHS))).eval()
    stock.load_state_dict(extracted.state_dict())
    ids = torch.randint(0, SMOLLM2_135M["vocab_size"], (1, tokens))
    return backbone, {
        DENSE: Variant(dense, nullcontext, ids),
        FULL: Variant(backbone.model, lambda: backbone.use(backbone.space.full()), ids),
        HALF: Variant(backbone.model, lambda: backbone.use(half), ids),
        EXTRACTED: Variant(extracted, nullcontext, ids),
        STOCK: Variant(stock, nullcontext, ids),
    }


def flop_share(backbone: ElasticBackbone, tokens: int) -> float:
    """Work of a training pass of the half network relative to the full one: logits at every position."""
    table = COUNTED["prefill_flops"](backbone, Workload(prompt_tokens=tokens))
    head = table.fixed * (tokens - 1)
    half = backbone.space.uniform(mlp=0.5, attention=0.67)
    return (table.cost(half) + head) / (table.full + head)


def switch_cost(backbone: ElasticBackbone, repeats: int = 2000) -> tuple[float, int]:
    """Milliseconds of one switch there and back, and the bytes that it allocates."""
    smallest = backbone.space.smallest()

    def switch() -> None:
        with backbone.use(smallest):
            pass

    milliseconds = 1e3 * median(seconds(switch) for _ in range(repeats))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        switch()
    return milliseconds, sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())


def first_token(backbone: ElasticBackbone, half: Variant, rounds: int) -> float:
    """Time of the first token after a switch from the full network, relative to the tokens that follow."""
    first, steady = [], []
    for _ in range(rounds):
        with half.use():
            first.append(seconds(half.next_token))
            steady.extend(seconds(half.next_token) for _ in range(3))
    return median(first) / median(steady)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a forward pass, and in the cache")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of interleaved runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", action="store_true", help="exit 1 if a ratio is above its limit")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone, made = variants(options.tokens)
    times = {}
    for kind, (method, more) in KINDS.items():
        runs = {name: getattr(variant, method) for name, variant in made.items()}
        times[kind] = interleaved(runs, options.rounds * more)
    rows = [
        (f"{kind}, {name} / {other}", times[kind][name] / times[kind][other], limit)
        for kind, name, other, limit in COMPARISONS
    ]
    share = flop_share(backbone, options.tokens)
    step = times["forward + backward"]
    rows.append(
        (f"forward + backward, {HALF} / its FLOP share {share:.3f}", step[HALF] / step[DENSE] / share, FLOP_SHARE_LIMIT)
    )
    rows.append(
        (
            "first token after a switch / steady state",
            first_token(backbone, made[HALF], options.rounds * 6),
            FIRST_TOKEN_LIMIT,
        )
    )
    milliseconds, allocated = switch_cost(backbone)
    rows.append(("a switch, in ms", milliseconds, SWITCH_LIMIT))
    rows.append(("memory allocated by a switch, in bytes", allocated, 0))
    show(
        rows, f"{options.tokens} tokens, batch 1, fp32, {options.threads} thread(s), medians of {options.rounds} rounds"
    )
    above = [name for name, value, limit in rows if limit is not None and value > limit]
    if options.check and above:
        sys.exit(f"above the limit: {', '.join(above)}")


def show(rows: list[tuple[str, float, float | None]], title: str) -> None:
    table = Table(title=title)
    for column in ("what", "measured", "limit"):
        table.add_column(column, no_wrap=True)
    for name, value, limit in rows:
        table.add_row(name, f"{value:.4g}", "" if limit is None else f"{limit:g}")
    Console(width=140).print(table)
    print(f"{LEGEND}; {device_description(torch.device('cpu'))['name']}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
