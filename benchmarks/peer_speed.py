"""Time of an elastic network and its half, here and in whittle, each beside the dense model: one run, in turns.

    python -m venv W && W/bin/pip install torch==2.13.0 whittle==0.6.0 "pyarrow<22"; W/bin/pip uninstall -y torchvision
    OMP_NUM_THREADS=1 python benchmarks/peer_speed.py --whittle_python W/bin/python

Random weights in the shape of SmolLM2-135M; half is half of every MLP and 2 of 3 KV groups. Every library has a process
of its own, which waits while another's run is timed. `masked` multiplies what is left out by 0, as networks do that do
not slice.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import first_look
import torch
from shapes import SMOLLM2_135M
from torch import Tensor

TOKENS = 256
ROUNDS = {"forward": 1, "forward + backward": 1, "one token": 6}
"""What is timed, and rounds as a multiple of those asked for."""
QUICK = {"rounds": 1, "results": Path("build/quick/peer_speed.json")}
"""Settings of a first look."""
Runs = dict[str, dict[str, Callable[[], Any]]]
"""By variant and kind."""


def runs_of(forward: Callable[[Tensor], Tensor], token: Callable[[], Any], use: Callable[[], Any]) -> dict[str, Any]:
    """A variant's runs: of a function from ids to logits, and one more token behind a cache."""
    ids = torch.randint(0, SMOLLM2_135M["vocab_size"], (1, TOKENS))

    def without_gradient(run: Callable[[], Any]) -> Callable[[], Any]:
        def timed() -> None:
            with use(), torch.no_grad():
                run()

        return timed

    def trained() -> None:
        with use():
            logits = forward(ids)
            torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()

    return {
        "forward": without_gradient(lambda: forward(ids)),
        "forward + backward": trained,
        "one token": without_gradient(token),
    }


def ours() -> Runs:
    """The stock model, masked and elastic."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from transformers import LlamaConfig, LlamaForCausalLM

    from flextron_lit.elastic import ElasticBackbone, extract

    def variant(model: Any, use: Callable[[], Any] = nullcontext) -> dict[str, Any]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=model.config)
        with torch.no_grad(), use():
            model(torch.ones(1, TOKENS, dtype=torch.long), past_key_values=cache, use_cache=True)

        def token() -> None:
            model(torch.ones(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            cache.crop(-1)

        return runs_of(lambda ids: model(ids, use_cache=False).logits, token, use)

    dense = LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).eval()
    masked = LlamaForCausalLM(dense.config).eval()
    for layer in masked.model.layers:
        for linear, kept in ((layer.mlp.down_proj, 768), (layer.self_attn.o_proj, 384)):
            mask = (torch.arange(linear.in_features) < kept).float()
            linear.register_forward_pre_hook(lambda _, given, mask=mask: given[0] * mask)
    backbone = ElasticBackbone(LlamaForCausalLM(dense.config).eval())
    space = backbone.space
    half = space.uniform(mlp=0.5, attention=0.67)
    return {
        "dense (transformers)": variant(dense),
        "masked half": variant(masked),
        "flextron-lit, full": variant(backbone.model, lambda: backbone.use(space.full())),
        "flextron-lit, half": variant(backbone.model, lambda: backbone.use(half)),
        "flextron-lit, half extracted": variant(extract(backbone, half)),
    }


def whittle() -> Runs:
    """Litgpt's model, and whittle's; the same shape."""
    from litgpt.config import Config
    from litgpt.model import GPT as Dense  # noqa: N811  # two classes of one name
    from whittle.models.gpt import GPT as Elastic  # noqa: N811

    shape = SMOLLM2_135M
    config = Config(
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_query_groups=shape["num_key_value_heads"],
        n_embd=shape["hidden_size"],
        head_size=64,
        intermediate_size=shape["intermediate_size"],
        padded_vocab_size=shape["vocab_size"],
        block_size=2 * TOKENS,
        bias=False,
        rotary_percentage=1.0,
        parallel_residual=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )

    def variant(model: Any, select: Callable[[], None] = lambda: None) -> dict[str, Any]:
        select()
        model.max_seq_length = 2 * TOKENS
        model.set_kv_cache(batch_size=1)
        with torch.no_grad():
            model(torch.ones(1, TOKENS, dtype=torch.long), torch.arange(TOKENS))

        def token() -> None:
            model(torch.ones(1, 1, dtype=torch.long), torch.tensor([TOKENS]))

        def forward(ids: Tensor) -> Tensor:
            return model(ids)

        return runs_of(forward, token, nullcontext)

    dense, full, half = Dense(config).eval(), Elastic(config).eval(), Elastic(config).eval()
    full.reset_super_network()

    def narrow() -> None:
        half.set_sub_network(
            sub_network_n_embd=config.n_embd,
            sub_network_intermediate_size=config.intermediate_size // 2,
            sub_network_num_heads=6,
            sub_network_n_layers=config.n_layer,
            sub_network_query_groups=2,
            sub_network_head_size=64,
        )

    return {
        "dense (litgpt)": variant(dense),
        "whittle, full": variant(full),
        "whittle, half": variant(half, narrow),
    }


LIBRARIES = {"ours": ours, "whittle": whittle}


def work(library: str) -> None:
    """Of a process of its own: say which variants there are, then time what is asked for."""
    torch.set_num_threads(1)
    runs = LIBRARIES[library]()
    print("found", json.dumps(list(runs)), flush=True)
    for line in sys.stdin:
        variant, kind = json.loads(line)
        begun = perf_counter()
        runs[variant][kind]()
        print("found", perf_counter() - begun, flush=True)


class Worker:
    """A library in its own process."""

    def __init__(self, python: str, library: str) -> None:
        command = [python, __file__, "--work", library]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.variants: list[str] = json.loads(self._found())

    def _found(self) -> str:
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith("found ")), None)
        if line is None:
            sys.exit("a library's process has ended; its message stands above")
        return line.removeprefix("found ")

    def seconds(self, variant: str, kind: str) -> float:
        assert self.process.stdin is not None
        print(json.dumps([variant, kind]), file=self.process.stdin, flush=True)
        return float(self._found())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whittle_python", help="an interpreter that has whittle")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/peer_speed.json"))
    parser.add_argument("--work", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    options = first_look.parsed(parser, QUICK, "one round, elsewhere")
    if options.work:
        work(options.work)
        return
    workers = [Worker(sys.executable, "ours")]
    if options.whittle_python:
        workers.append(Worker(options.whittle_python, "whittle"))
    by_variant = {variant: worker for worker in workers for variant in worker.variants}
    times: dict[str, dict[str, float]] = {variant: {} for variant in by_variant}
    for kind, more in ROUNDS.items():
        for worker in workers:
            for variant in worker.variants:
                worker.seconds(variant, kind)
        rounds = [
            {variant: worker.seconds(variant, kind) for variant, worker in by_variant.items()}
            for _ in range(options.rounds * more)
        ]
        for variant in by_variant:
            times[variant][kind] = median(each[variant] for each in rounds)
            reference = "dense (litgpt)" if "whittle" in variant else "dense (transformers)"
            ratio = median(each[variant] / each[reference] for each in rounds)
            times[variant][f"{kind}, of dense"] = ratio
            print(f"{variant}, {kind}: {ratio:.3f} of {reference}", flush=True)
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from kept_results import about

    from flextron_lit.files.whole_file import write_json

    write_json(options.results, {"times": times, "about": about()})


if __name__ == "__main__":
    main()
