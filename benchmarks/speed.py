"""Time of the elastic network and its sub-networks relative to the dense model, from interleaved runs.

    python benchmarks/speed.py

The weights are random in the shape of SmolLM2-135M: speed does not depend on their values. On a shared machine only
ratios within one run mean something, so each round times every variant once, and medians over rounds are compared.
"""

from __future__ import annotations

import argparse
import platform
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

sys.path.insert(0, str(Path(__file__).parent.parent))
from flextron_lit.elastic import ElasticBackbone

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
LIMITS = {
    "forward, full width": 1.02,
    "forward + backward, full width": 1.02,
    "forward, half MLP and 2 of 3 KV groups": 0.69,
    "forward + backward, half MLP and 2 of 3 KV groups": 0.70,
    "one token with a cache, half MLP and 2 of 3 KV groups": 0.74,
    "first token after a switch, to steady state": 1.02,
}

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
    ids = torch.randint(0, SMOLLM2_135M["vocab_size"], (1, tokens))
    return backbone, {
        "dense": Variant(dense, nullcontext, ids),
        "full width": Variant(backbone.model, lambda: backbone.use(backbone.space.full()), ids),
        "half MLP and 2 of 3 KV groups": Variant(backbone.model, lambda: backbone.use(half), ids),
    }


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
    ratios: dict[str, float] = {}
    kinds = {"forward": "forward", "forward + backward": "forward_backward", "one token with a cache": "token"}
    for kind, method in kinds.items():
        rounds = options.rounds * (6 if method == "token" else 1)
        times = interleaved({name: getattr(variant, method) for name, variant in made.items()}, rounds)
        ratios |= {f"{kind}, {name}": times[name] / times["dense"] for name in list(made)[1:]}
    half = made["half MLP and 2 of 3 KV groups"]
    ratios["first token after a switch, to steady state"] = first_token(backbone, half, options.rounds * 6)
    milliseconds, allocated = switch_cost(backbone)

    table = Table(title=f"relative to dense, {options.tokens} tokens, batch 1, fp32, {options.threads} thread(s)")
    for column in ("what", "ratio", "limit"):
        table.add_column(column, no_wrap=True)
    for name, ratio in ratios.items():
        table.add_row(name, f"{ratio:.3f}", f"{LIMITS[name]:.2f}" if name in LIMITS else "")
    table.add_row("a switch", f"{milliseconds:.4f} ms", "0.05 ms")
    table.add_row("memory allocated by a switch", f"{allocated} bytes", "0 bytes")
    Console(width=100).print(table)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, rounds {options.rounds}")
    above = [name for name, limit in LIMITS.items() if ratios[name] > limit]
    if milliseconds > 0.05 or allocated:
        above.append("a switch")
    if options.check and above:
        sys.exit(f"above the limit: {', '.join(above)}")


if __name__ == "__main__":
    main()
