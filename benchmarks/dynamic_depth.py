"""What skips layers or chooses them for every token, against networks of ours, at equal mean FLOPs.

    pip install --no-deps -r benchmarks/requirements.txt
    python main.py pipeline -c configs/quickstart.yaml
    OMP_NUM_THREADS=1 python benchmarks/dynamic_depth.py --dynamic RUN/dynamic_router --texts wikitext2_raw_test.txt

Techniques of economize on SmolLM2-135M, trained (where they train) on the tokens that rivals are tuned on
(`rivals.py`), their thresholds moved until training text takes the wanted share; ours: dynamic and static answers of a
checkpoint, and networks that skip layers by the excess losses of widths 0, which nothing was trained for. FLOPs are
those of a request of 256 + 64 tokens as a share of the full network's, and of each text as measured there. Losses are
in nats per token, fp32. What is in `--results` is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import depth_ways as ways
import first_look
from depth_cost import Request
from depth_skips import Skips
from depth_ways import Run, documents, measured
from rival_bench import NOVELS, OLD, Bench
from rival_tuning import Batch, training_text
from rivals import CHECKPOINT, STEPS

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.selection import Selection
from flextron_lit.losses.measured_loss import mean_loss
from flextron_lit.routers.budget_prices import solve
from flextron_lit.routers.dynamic import DynamicPolicy, mean_ratio

TARGETS = [0.9, 0.8, 0.7]
BLOCK_SIZE = 512
RESULTS = Path("benchmarks/results/dynamic_depth.json")
CALIBRATION = 8192
"""Tokens that excess losses are computed on."""
PRICED = 512
"""Tokens of each training domain that thresholds are found on."""
SEARCHED = 512
"""Tokens that the search for layers to skip measures each of them on, anew for each that goes."""
QUICK = {
    "targets": [0.9],
    "tokens": 512,
    "cut": 128,
    "steps": 2,
    "calibration": 512,
    "priced": 32,
    "searched": 16,
    "results": Path("build/quick/dynamic_depth.json"),
}
"""Settings of a first look; `cut` leaves the first tokens of each block."""

DYNAMIC, STATIC, MATCHED = "Flextron, dynamic", "Flextron, static", "Flextron, static at the dynamic one's FLOPs"
LAYERS, BLOCKS = "Flextron, whole layers by excess losses", "Flextron, blocks by excess losses"
EXIT, READOUT = "economize, early exit", "economize, early exit with a readout"
TRAINED_EXIT, SKIPPED = "economize, LayerSkip training", "economize, layers skipped by search"
CONFIDENT = "economize, CALM (softmax)"
Row = dict[str, Any]
Cell = tuple[str, float, Callable[[], Row]]
"""A way, the share of FLOPs that it is asked for, and what measures it."""


class Depth(Bench):
    """The original with what every way starts from."""

    @cached_property
    def request(self) -> Request:
        return Request.of(self.original.config, self.workload)

    @cached_property
    def training(self) -> list[Batch]:
        # what writes the text changes the classes of its modules
        return training_text(copy.deepcopy(self.original), self.text, self.options.steps)

    @cached_property
    def priced(self) -> list[ways.Document]:
        """Training text that thresholds are found on."""
        blocks = self.text.calibration_batches(len(self.text.domain_names) * BLOCK_SIZE, batch_size=1)
        cut = [{name: each[:, : self.options.priced] for name, each in block.items()} for block in blocks]
        return documents(cut)

    @property
    def measured_on(self) -> dict[str, list[Batch]]:
        """Test documents of the training domains, and the texts of `--texts`."""
        known = {name: batches for name, batches in super().measured_on.items() if name not in (*OLD, NOVELS)}
        cut = self.options.cut
        return {name: [{n: each[:, :cut] for n, each in batch.items()} for batch in known[name]] for name in known}

    @cached_property
    def pieces(self) -> dict[str, list[ways.Document]]:
        """Documents of every text by its name."""
        return {name: documents(batches) for name, batches in self.measured_on.items()}

    def keep_row(self, name: str, target: float, make: Callable[[], Row]) -> None:
        """Measure a row, and say it."""
        cell = f"{name}, {target}"

        def timed() -> Row:
            begun = time.monotonic()
            return {**make(), "seconds": time.monotonic() - begun}

        row = self.keep("rows", cell, timed)
        gc.collect()
        if "losses" in row:
            print(f"{cell}: {row['flops']['all domains']:.3f} of the FLOPs, {said(row['losses'])}", flush=True)

    def of_run(self, run: Run) -> Row:
        """Losses and FLOPs by text."""
        found = {name: measured(run, pieces) for name, pieces in self.pieces.items()}
        sizes = {name: sum(ids.numel() for ids, _ in self.pieces[name]) for name in self.text.domain_names}
        flops = {name: share for name, (_, share) in found.items()}
        overall = sum(flops[name] * size for name, size in sizes.items()) / sum(sizes.values())
        return {
            "flops": {**flops, "all domains": overall},
            "losses": {name: loss for name, (loss, _) in found.items()},
        }

    def of_selection(self, backbone: ElasticBackbone, selection: Selection, share: float | None) -> Row:
        """The same of an elastic network; a policy says itself what its tokens took."""
        flops, losses, counts = {}, {}, {}
        for name, batches in self.measured_on.items():
            with backbone.use(selection):
                losses[name] = mean_loss(backbone.model, batches)
            if isinstance(selection, DynamicPolicy):
                counts[name] = selection.take()
                flops[name] = mean_ratio(counts[name], selection.table)
            else:
                assert share is not None
                flops[name] = share
        own = [counts[name] for name in self.text.domain_names if name in counts]
        if isinstance(selection, DynamicPolicy):
            share = mean_ratio(torch.stack(own).sum(0), selection.table)
        return {"flops": {**flops, "all domains": share}, "losses": losses}


def said(losses: dict[str, float]) -> str:
    return ", ".join(f"{text} {loss:.3f}" for text, loss in losses.items())


def of_original(bench: Depth) -> Iterator[Cell]:
    """What all of them start from, by both ways of measuring: they are to agree."""

    def make() -> Row:
        losses = {name: mean_loss(bench.original, batches) for name, batches in bench.measured_on.items()}
        run = ways.Skipping(ways.attached(bench.original, ways.shared(1)), (), bench.request)
        document = bench.of_run(run)["losses"]
        assert all(abs(losses[name] - document[name]) < 1e-3 for name in losses), (losses, document)
        return {"flops": dict.fromkeys([*losses, "all domains"], 1.0), "losses": losses}

    yield "original", 1.0, make


def of_routed(bench: Depth) -> Iterator[Cell]:
    """Techniques that choose layers for every token."""
    for name, way in ways.WAYS.items():
        prepared = partial(trained_way, bench, way)
        if not way.again:
            # one training for all shares, the first of them in mind
            prepared = cache(lambda _, once=prepared: once(bench.options.targets[0]))
        for target in bench.options.targets:
            yield name, target, partial(routed, bench, target, way, prepared)


def trained_way(bench: Depth, way: ways.Way, target: float) -> tuple[ways.Routed, dict[str, Any] | None]:
    config = way.config(bench.request, target)
    efficient, trained = ways.attached(bench.original, config), None
    if way.objective is not None:
        trained = ways.train(efficient, way.objective(bench.request, target), bench.training)
    return ways.Routed(efficient, config.technique, bench.request), trained


def routed(bench: Depth, target: float, way: ways.Way, prepared: Callable[[float], Any]) -> Row:
    run, trained = prepared(target)

    def cost(price: float) -> float:
        run.price = price
        return measured(run, bench.priced)[1]

    run.price = solve(cost, target)
    return {**bench.of_run(run), "about": way.about, "price": run.price, "trained": trained}


def of_confidence(bench: Depth) -> Iterator[Cell]:
    """The measure that asks the head after every layer: what it takes is more than what it can save."""
    layer = float(bench.request.layers[0]) / bench.workload.total_tokens
    about = (
        f"its confidence asks the head after every layer, for {bench.request.head / layer:.1f} layers' FLOPs a time: "
        "no share below 1"
    )
    for target in bench.options.targets:
        yield CONFIDENT, target, lambda: {"about": about}


def of_exits(bench: Depth) -> Iterator[Cell]:
    """Networks that end after as many layers as come nearest to the share."""
    exits = {target: bench.request.nearest(target) for target in bench.options.targets}

    def untrained(layer: int) -> Row:
        run = ways.Exiting(ways.attached(bench.original, ways.shared(layer)), bench.request)
        return {**bench.of_run(run), "layers": layer, "about": "no training"}

    def with_readout(layer: int) -> Row:
        config, objective = ways.readout(layer)
        efficient = ways.attached(bench.original, config)
        done = ways.train(efficient, objective, bench.training)
        about = "an adapter before the head, which alone is trained"
        found = bench.of_run(ways.Exiting(efficient, bench.request))
        return {**found, "layers": layer, "trained": done, "about": about}

    @cache
    def layer_skip() -> tuple[PreTrainedModel, dict[str, Any]]:
        efficient = ways.attached(bench.original, ways.shared(1))
        objective = ways.layer_skip_training(sorted(set(exits.values())))
        done = ways.train(efficient, objective, bench.training, ways.SHARED_RATE)
        return efficient.base_model.eval(), done

    def by_layer_skip(layer: int) -> Row:
        model, done = layer_skip()
        run = ways.Exiting(ways.attached(model, ways.shared(layer)), bench.request)
        about = "all weights, one training for all shares: layer dropout, and a loss at each of these exits"
        return {**bench.of_run(run), "layers": layer, "trained": done, "about": about}

    for name, make in ((EXIT, untrained), (TRAINED_EXIT, by_layer_skip), (READOUT, with_readout)):
        for target, layer in exits.items():
            yield name, target, partial(make, layer)


def of_search(bench: Depth) -> Iterator[Cell]:
    """The library's greedy search for layers to leave out: nothing is trained."""
    options, layers = bench.options, len(bench.request.layers)
    gone = {target: layers - bench.request.nearest(target) for target in options.targets}
    half = options.searched // 2

    def search() -> list[int]:
        blocks = bench.text.calibration_batches(2 * BLOCK_SIZE, batch_size=1)
        efficient = ways.attached(bench.original, ways.shared(1))
        return ways.skipped_first(efficient, [block["input_ids"][:, :half] for block in blocks[:2]], max(gone.values()))

    def make(count: int) -> Row:
        order = bench.keep("searched", SKIPPED, search)
        assert len(order) >= count, "an earlier search was for fewer layers: measure into another file"
        run = ways.Skipping(ways.attached(bench.original, ways.shared(1)), order[:count], bench.request)
        about = "greedy, by divergence from the full network; no training"
        return {**bench.of_run(run), "skipped": order[:count], "about": about}

    for target, count in gone.items():
        yield SKIPPED, target, partial(make, count)


def of_skips(bench: Depth) -> Iterator[Cell]:
    """Static networks of ours that lack layers."""
    tokens = bench.options.calibration

    @cache
    def made() -> Skips:
        found = Skips(bench.original, bench.request)
        blocks = partial(bench.text.calibration_batches, tokens, batch_size=1)
        found.lost = bench.keep("excess", str(tokens), lambda: found.computed(blocks()))
        return found

    def make(name: str, target: float) -> Row:
        skips = made()
        found = skips.layers(target) if name == LAYERS else skips.blocks(target)
        row = bench.of_selection(skips.backbone, found, bench.request.table.ratio(found))
        return {**row, "sub_network": found.to_json(), "about": "no training"}

    for target in bench.options.targets:
        for name in (LAYERS, BLOCKS):
            yield name, target, partial(make, name, target)


def of_checkpoint(bench: Depth, folder: Path) -> Iterator[Cell]:
    """What the routers of a checkpoint answer, dynamic and static."""
    loaded = load_elastic(str(folder / "flextron" if (folder / "flextron").is_dir() else folder))
    loaded.backbone.model.eval()

    def dynamic(target: float) -> Row:
        policy = loaded.dynamic_routing.answer(f"flops={target}", loaded.backbone)
        full = loaded.dynamic_routing.routers["flops"].table.full
        assert abs(full / bench.request.table.full - 1) < 1e-6, "FLOPs of another request"
        return {**bench.of_selection(loaded.backbone, policy, None), "about": "a width for every token and block"}

    def static(share: float) -> Row:
        answer = loaded.answer(f"flops={share}", workload=bench.workload)
        ratio = loaded.routing(workload=bench.workload).tables["flops"].ratio(answer.sub_network)
        row = bench.of_selection(loaded.backbone, answer.sub_network, ratio)
        return {**row, "sub_network": answer.sub_network.to_json(), "about": answer.how}

    def matched(target: float) -> Row:
        return static(bench.kept["rows"][f"{DYNAMIC}, {target}"]["flops"]["all domains"])

    for name, make in ((DYNAMIC, dynamic), (STATIC, static), (MATCHED, matched)):
        for target in bench.options.targets:
            yield name, target, partial(make, target)


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    bench = Depth(options)
    checkpoint = of_checkpoint(bench, options.dynamic) if options.dynamic else []
    others = (of_skips, of_confidence, of_routed, of_exits, of_search)
    cells = [*of_original(bench), *checkpoint, *(cell for each in others for cell in each(bench))]
    # all ways at one share first: whoever stops it has something to compare
    shares = [1.0, *options.targets]
    for name, target, make in sorted(cells, key=lambda cell: shares.index(cell[1])):
        bench.keep_row(name, target, make)


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--dynamic", type=Path, help="a Flextron checkpoint or run folder with a router for FLOPs")
    made.add_argument("--texts", type=Path, nargs="*", default=[], help="text files that nothing was trained on")
    made.add_argument("--targets", type=float, nargs="+", default=TARGETS, help="shares of the FLOPs")
    made.add_argument("--tokens", type=int, default=2048, help="measured of each text")
    made.add_argument("--steps", type=int, default=STEPS, help=f"blocks of {BLOCK_SIZE} tokens that each is trained on")
    made.add_argument("--calibration", type=int, default=CALIBRATION, help="tokens that excess losses are of")
    made.add_argument("--priced", type=int, default=PRICED, help="tokens a domain that thresholds are found on")
    made.add_argument("--searched", type=int, default=SEARCHED, help="tokens that a search for layers measures on")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--checkpoint", default=CHECKPOINT)
    made.add_argument("--results", type=Path, default=RESULTS)
    made.set_defaults(cut=None, data="embedded", block_size=BLOCK_SIZE, keep=None)
    return first_look.parsed(made, QUICK, "little of everything, elsewhere")


if __name__ == "__main__":
    main()
