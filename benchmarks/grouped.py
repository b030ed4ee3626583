"""Time of tokens that each take their own MLP width, against the full network and two other ways to compute the same.

    OMP_NUM_THREADS=1 python benchmarks/grouped.py
    python benchmarks/grouped.py --device cuda --dtype bfloat16 --shape llama-2-7b --tokens 4096

Every token draws a width for every MLP, half of the full one on average; attention is full. The router of every block
is one linear map; its answer is computed and timed, then replaced by the draw. The weights are random. Each round runs
every way once, in turning order, and medians over rounds of ratios within one are shown. What happens inside a pass is
timed on a CPU alone: on a GPU it would have to wait for every part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from shapes import SHAPES, SMOLLM2

from flextron_lit.costs.workload import Dtype
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.families.llama import ElasticLlamaMLP
from flextron_lit.elastic.grouping import TokenGroups
from flextron_lit.elastic.kv_cache import fill
from flextron_lit.latency.device import device_description
from flextron_lit.latency.timing import seconds

SHARES = (0.4, 0.3, 0.2, 0.1)
"""Of the tokens that take a quarter, half, three quarters and all of an MLP: half on average."""
FULL, BANDS, MASKED, PREFIXES = "full network", "bands", "masked full product", "a prefix for each width"
HALF = "half the width for all"
"""What a static router can have."""
FORWARD, TRAINING, TOKEN = "forward", "forward + backward", "one token with a cache"
WHOLE, INSIDE, ROUTERS = "whole", "inside MLPs", "routers, of the whole"
LIMITS = {
    (FORWARD, BANDS, INSIDE): 0.62,
    (FORWARD, BANDS, WHOLE): 0.80,
    (FORWARD, BANDS, ROUTERS): 0.02,
    (TOKEN, BANDS, ROUTERS): 0.05,
}


class DrawnWidths:
    """A policy that pays for its linear routers and then answers with widths that were drawn before."""

    def __init__(self, backbone: ElasticBackbone, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        blocks, hidden_size, like = (
            backbone.space.blocks,
            backbone.model.config.hidden_size,
            backbone.model.lm_head.weight,
        )
        self.weights = [torch.randn(len(block.widths), hidden_size, generator=generator).to(like) for block in blocks]
        self.biases = [torch.randn(len(block.widths), generator=generator).to(like) for block in blocks]
        shares = torch.tensor(SHARES)
        self.drawn = [
            torch.multinomial(shares, tokens, replacement=True, generator=generator)[None].to(like.device)
            if block.kind == "mlp"
            else torch.full((1, tokens), len(block.widths) - 1, device=like.device)
            for block in blocks
        ]
        self.tokens, self.passes, self.seconds = tokens, 0, 0.0

    def begin(self, real: Tensor | None) -> None:
        self.passes += 1

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        start = perf_counter()
        F.linear(hidden_states.detach(), self.weights[block], self.biases[block]).argmax(-1)
        self.seconds += perf_counter() - start
        if hidden_states.shape[1] == self.tokens:
            return self.drawn[block]
        # another token at every step
        position = self.passes % self.tokens
        return self.drawn[block][:, position : position + 1]

    def note(self, block: int, counts: list[int]) -> None:
        pass


def masked_product(mlp: ElasticLlamaMLP, x: Tensor, groups: TokenGroups) -> Tensor:
    """All units of all tokens, then zeros where a token does not use them."""
    own = torch.zeros(x.shape[:-1].numel(), 1, dtype=torch.int64, device=x.device)
    for band in groups.bands:
        own[slice(None) if groups.order is None else groups.order[: band.rows]] = band.stop
    units = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    used = torch.arange(units.shape[-1], device=x.device) < own.view(*x.shape[:-1], 1)
    return mlp.down_proj(units * used)


def prefix_by_prefix(mlp: ElasticLlamaMLP, x: Tensor, groups: TokenGroups) -> Tensor:
    """The tokens of each width on their own, each with the whole prefix of that width."""
    rows = x.flatten(0, -2)
    rows = rows if groups.order is None else rows[groups.order]
    done = []
    for band, wider in zip(reversed(groups.bands), [0, *(band.rows for band in reversed(groups.bands))], strict=False):
        own, width = rows[wider : band.rows], band.stop
        gates, ups = F.linear(own, mlp.gate_proj.weight[:width]), F.linear(own, mlp.up_proj.weight[:width])
        done.append(F.linear(mlp.act_fn(gates) * ups, mlp.down_proj.weight[:, :width]))
    joined = torch.cat(done)
    if groups.order is not None:
        joined = torch.zeros_like(joined).index_copy(0, groups.order, joined)
    return joined.view_as(x)


OURS: Callable[..., Tensor] = ElasticLlamaMLP._grouped
WAYS = {BANDS: OURS, MASKED: masked_product, PREFIXES: prefix_by_prefix}


class Network:
    """The network, and what it needs to run in any of the ways."""

    def __init__(self, shape: str, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[shape], dtype=dtype)
        with device:
            self.model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
            self.ids = torch.randint(0, config.vocab_size, (1, tokens))
        self.backbone = ElasticBackbone(self.model)
        self.device = device
        self.half = self.backbone.space.uniform(mlp=0.5, attention=1.0)
        self.policy = DrawnWidths(self.backbone, tokens)
        self.cache = DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model(self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.inside = 0.0
        for layer in self.model.model.layers:
            layer.mlp.register_forward_pre_hook(self.enter)
            layer.mlp.register_forward_hook(self.leave)

    def enter(self, *_: Any) -> None:
        self.inside -= perf_counter()

    def leave(self, *_: Any) -> None:
        self.inside += perf_counter()

    @contextmanager
    def computed(self, way: str) -> Iterator[None]:
        """Inside, tokens have their drawn widths, computed in this way; or all have the full one, or half of it."""
        if way in (FULL, HALF):
            with self.backbone.use(self.backbone.space.full() if way == FULL else self.half):
                yield
            return
        ElasticLlamaMLP._grouped = WAYS[way]
        try:
            with self.backbone.use(self.policy):
                yield
        finally:
            ElasticLlamaMLP._grouped = OURS

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.model(self.ids, use_cache=False).logits

    def training(self) -> None:
        self.model(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.model.zero_grad()

    @torch.no_grad()
    def token(self) -> None:
        # as if it were that of what is active: only the time counts
        fill(self.cache, self.backbone.selection.current)
        self.model(self.ids[:, -1:], past_key_values=self.cache, use_cache=True)
        self.cache.crop(-1)

    def timed(self, run: Callable[[], Any], way: str) -> dict[str, float]:
        """Seconds of one run: all of it and, on a CPU, inside MLPs (in the forward pass) and in routers."""
        with self.computed(way):
            self.inside = self.policy.seconds = 0.0
            whole = {WHOLE: seconds(run, self.device)}
            return whole if self.device.type == "cuda" else whole | {INSIDE: self.inside, ROUTERS: self.policy.seconds}


def ratios(network: Network, run: Callable[[], Any], ways: list[str], rounds: int) -> dict[tuple[str, str], float]:
    """Per way, medians of its times over the full network's in the same round, and of its routers' share."""
    names = [FULL, *ways]
    for name in names:
        network.timed(run, name)
    found: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        times = {name: network.timed(run, name) for name in order}
        for way in ways:
            for what, took in times[way].items():
                whole = times[way][WHOLE] if what == ROUTERS else times[FULL][what]
                found.setdefault((way, what), []).append(took / whole)
    return {key: median(values) for key, values in found.items()}


def check_that_all_ways_agree(network: Network) -> None:
    def logits(way: str) -> Tensor:
        with network.computed(way):
            return network.forward()

    tolerance = 1e-4 if network.model.dtype == torch.float32 else 5e-2
    ours = logits(BANDS)
    for way in (MASKED, PREFIXES):
        difference = float((logits(way) - ours).norm() / ours.norm())
        assert difference < tolerance, f"{way}: {difference:.2e} away, relative to the logits"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a forward pass, and in the cache")
    parser.add_argument(
        "--rounds", type=int, default=15, help="rounds of interleaved runs; six times as many of a token"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", choices=SHAPES, default=SMOLLM2)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    parser.add_argument("--check", action="store_true", help="exit 1 if a ratio is above its limit (of a CPU)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    network = Network(options.shape, options.tokens, options.device, getattr(torch, options.dtype))
    check_that_all_ways_agree(network)
    kinds = {
        FORWARD: (network.forward, [*WAYS, HALF], options.rounds),
        TRAINING: (network.training, [*WAYS, HALF], options.rounds),
        TOKEN: (network.token, [BANDS, HALF], 6 * options.rounds),
    }
    rows = []
    for kind, (run, ways, rounds) in kinds.items():
        for (way, what), value in ratios(network, run, ways, rounds).items():
            # backward happens outside the modules
            if kind != TRAINING or what == WHOLE:
                rows.append((kind, way, what, value, LIMITS.get((kind, way, what))))
    kind_of = f"{options.shape}, {options.tokens} tokens, batch 1, {options.dtype}"
    title = f"{kind_of}, {options.threads} thread(s), medians of {options.rounds} rounds"
    table = Table(title=title)
    for column in ("what is run", "way", "time", "of the full network's", "limit"):
        table.add_column(column, no_wrap=True)
    for kind, way, what, value, limit in rows:
        table.add_row(kind, way, what, f"{value:.4g}", "" if limit is None else f"{limit:g}")
    Console(width=140).print(table)
    print(f"{device_description(options.device)['name']}, torch {torch.__version__}")
    above = [f"{kind}, {what}" for kind, _, what, value, limit in rows if limit is not None and value > limit]
    if options.check and above:
        sys.exit(f"above the limit: {', '.join(above)}")


if __name__ == "__main__":
    main()
