"""Smaller networks, smaller numbers, and both: GGUF files in llama.cpp, their speed, size, memory and loss.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py --checkpoint runs/quickstart/joint_tuning \
      --text wikitext2_raw_test.txt

Every file answers the same request in a process of its own, file after file, in several rounds; speeds are medians
relative to the full network in F16 of the same round. Losses are of the stored weights, computed by torch; those that
`--results` has, and files that `--work` has, are not made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import first_look
from gguf_types import FILE_TYPES, as_stored, rewrite
from kept_results import Kept
from llama_cpp import asked

from flextron_lit.data import text_blocks
from flextron_lit.elastic.extraction import extract
from flextron_lit.losses.measured_loss import mean_loss
from flextron_lit.model import FlextronModel

MAIN = Path(__file__).parent.parent / "main.py"
BLOCK_SIZE = 512
REFERENCE = "1.0 F16"
QUICK = {
    "budgets": ["1.0", "97M"],
    "tokens": BLOCK_SIZE,
    "rounds": 1,
    "results": Path("build/quick/quantization.json"),
    "work": Path("build/quick/quantization"),
}
"""Settings of a first look."""


def files_of(options: argparse.Namespace) -> dict[str, Path]:
    """GGUF files by name, written where `--work` has none yet: the network in F16 by `export`, the others from it."""
    found = {}
    for budget in options.budgets:
        folder = options.work / budget
        if not folder.is_dir():
            command = [sys.executable, str(MAIN), "export", "--checkpoint", str(options.checkpoint)]
            command += ["--budget", budget, "--format", "gguf", "--dtype", "float16", "--output", str(folder)]
            subprocess.run(command, check=True)
        (plain,) = folder.glob("*.gguf")
        for name in FILE_TYPES:
            found[f"{budget} {name}"] = file = options.work / f"{budget} {name}.gguf"
            if not file.is_file():
                rewrite(plain, unfinished := file.with_suffix(".part"), name)
                unfinished.rename(file)
    return found


def keep_losses(options: argparse.Namespace, kept: Kept) -> None:
    """Nats per token of every file's weights on the text."""
    model = FlextronModel.from_pretrained(str(options.checkpoint))
    blocks = text_blocks(options.text, model.tokenizer, tokens=options.tokens, block_size=BLOCK_SIZE)
    batches = [{"input_ids": block[None], "labels": block[None]} for block in blocks]

    def loss(budget: str, name: str) -> float:
        small = extract(model.backbone, model.flextron.answer(budget).sub_network).eval()
        as_stored(small, name)
        return mean_loss(small, batches)

    for budget, name in product(options.budgets, FILE_TYPES):
        found = kept.keep("losses", f"{budget} {name}", partial(loss, budget, name))
        print(f"{budget} {name}: {found:.3f}", flush=True)


def row(name: str, size: float, loss: float, rounds: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Of one file."""
    found = {"mb": size, "loss": loss, "memory_mb": median(each[name]["memory_mb"] for each in rounds)}
    for speed in ("prompt", "predicted"):
        found[speed] = median(each[name][speed] / each[REFERENCE][speed] for each in rounds)
        found[f"{speed}_per_second"] = median(each[name][speed] for each in rounds)
    return found


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.results, {"text": options.text.name, "tokens": options.tokens, "threads": options.threads})
    keep_losses(options, kept)
    files = files_of(options)
    rounds = [{name: asked(file, options.threads) for name, file in files.items()} for _ in range(options.rounds)]
    table = Table("network", "MB", "memory MB", "prompt", "answer", "nats")
    for name, file in files.items():
        found = row(name, file.stat().st_size / 1e6, kept.kept["losses"][name], rounds)
        kept.write("rows", name, found)
        shown = [f"{found['mb']:.0f}", f"{found['memory_mb']:.0f}", f"{found['prompt']:.2f}"]
        table.add_row(name, *shown, f"{found['predicted']:.2f}", f"{found['loss']:.3f}")
    Console(width=100).print(table)


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", type=Path, help="a Flextron checkpoint or run folder")
    made.add_argument("--budgets", nargs="+", default=["1.0", "0.9", "0.8", "0.7", "0.6"])
    made.add_argument("--text", type=Path)
    made.add_argument("--work", type=Path, default=Path("build/quantization"), help="where the files are kept, 3 GB")
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/quantization.json"))
    return first_look.parsed(made, QUICK, "two budgets, one round, elsewhere")


if __name__ == "__main__":
    main()
