"""Smaller networks, smaller numbers, and both: GGUF files in llama.cpp, their speed, size, memory and loss.

    OMP_NUM_THREADS=1 python benchmarks/quantization.py --checkpoint runs/quickstart/joint_tuning \
      --text wikitext2_raw_test.txt

Every file answers the same request in a process of its own, file after file, in several rounds; speeds are medians
relative to the full network in F16 of the same round. Losses are of the stored weights, computed by torch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from gguf_types import FILE_TYPES, as_stored, rewrite
from kept_results import about

from flextron_lit.data import text_blocks
from flextron_lit.elastic.extraction import extract
from flextron_lit.files.whole_file import write_json
from flextron_lit.losses.measured_loss import mean_loss
from flextron_lit.model import FlextronModel

MAIN = Path(__file__).parent.parent / "main.py"
PROMPT, ANSWER = 256, 64
BLOCK_SIZE = 512
REFERENCE = "1.0 F16"
QUICK = {
    "budgets": ["1.0", "97M"],
    "tokens": BLOCK_SIZE,
    "rounds": 1,
    "results": Path("build/quick/quantization.json"),
}
"""Settings of a first look."""


def answer(file: str, threads: int) -> None:
    """Of a process of its own: tokens a second of prompt and answer, and the memory that both took."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, threads
    params.cpuparams_batch.n_threads = threads
    params.warmup, params.fit_params = True, False
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    server = xllamacpp.Server(params)
    found = []
    for turn in range(3):
        # another prompt each time, so that none is found in the cache
        ids = [100 + turn + 7 * place for place in range(PROMPT)]
        asked = {"prompt": ids, "max_tokens": ANSWER, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        given: Any = server.handle_completions(asked)
        found.append((json.loads(given) if isinstance(given, str) else given)["timings"])
    speeds = {name: median(each[f"{name}_per_second"] for each in found) for name in ("prompt", "predicted")}
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("found", json.dumps({**speeds, "memory_mb": (after - before) / 1024}), flush=True)


def asked(file: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--answer", str(file), "--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("found ")]
    return json.loads(line.removeprefix("found "))


def exported(checkpoint: Path, budget: str, folder: Path) -> Path:
    """The F16 file of a budget."""
    command = [sys.executable, str(MAIN), "export", "--checkpoint", str(checkpoint), "--budget", budget]
    command += ["--format", "gguf", "--dtype", "float16", "--output", str(folder)]
    subprocess.run(command, check=True)
    (file,) = folder.glob("*.gguf")
    return file


def files_of(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    found = {}
    for budget in options.budgets:
        plain = exported(options.checkpoint, budget, folder / budget)
        for name in FILE_TYPES:
            found[f"{budget} {name}"] = plain.with_name(f"{name}.gguf")
            rewrite(plain, found[f"{budget} {name}"], name)
    return found


def losses_of(options: argparse.Namespace) -> dict[str, float]:
    """Nats per token of every file's weights on the text."""
    model = FlextronModel.from_pretrained(str(options.checkpoint))
    blocks = text_blocks(options.text, model.tokenizer, tokens=options.tokens, block_size=BLOCK_SIZE)
    batches = [{"input_ids": block[None], "labels": block[None]} for block in blocks]
    found = {}
    for budget in options.budgets:
        for name in FILE_TYPES:
            small = extract(model.backbone, model.flextron.answer(budget).sub_network).eval()
            as_stored(small, name)
            found[f"{budget} {name}"] = mean_loss(small, batches)
            print(f"{budget} {name}: {found[f'{budget} {name}']:.3f}", flush=True)
    return found


def measured(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Rows by file."""
    losses = losses_of(options)
    with tempfile.TemporaryDirectory() as folder:
        files = files_of(options, Path(folder))
        rounds = [{name: asked(file, options.threads) for name, file in files.items()} for _ in range(options.rounds)]
        sizes = {name: file.stat().st_size / 1e6 for name, file in files.items()}
    rows = {}
    for name in files:
        row = {"mb": sizes[name], "loss": losses[name]}
        row["memory_mb"] = median(each[name]["memory_mb"] for each in rounds)
        for speed in ("prompt", "predicted"):
            row[speed] = median(each[name][speed] / each[REFERENCE][speed] for each in rounds)
            row[f"{speed}_per_second"] = median(each[name][speed] for each in rounds)
        rows[name] = row
    return rows


def main() -> None:
    options = parsed()
    if options.answer:
        answer(options.answer, options.threads)
        return
    torch.set_num_threads(options.threads)
    rows = measured(options)
    write_json(options.results, {"rows": rows, "text": options.text.name, "tokens": options.tokens, "about": about()})
    table = Table("network", "MB", "memory MB", "prompt", "answer", "nats")
    for name, row in rows.items():
        cells = (f"{row['mb']:.0f}", f"{row['memory_mb']:.0f}", f"{row['prompt']:.2f}", f"{row['predicted']:.2f}")
        table.add_row(name, *cells, f"{row['loss']:.3f}")
    Console(width=100).print(table)


def parsed() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--checkpoint", type=Path, help="a Flextron checkpoint or run folder")
    made.add_argument("--budgets", nargs="+", default=["1.0", "0.9", "0.8", "0.7", "0.6"])
    made.add_argument("--text", type=Path)
    made.add_argument("--tokens", type=int, default=4096)
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--results", type=Path, default=Path("benchmarks/results/quantization.json"))
    made.add_argument("--quick", action="store_true", help="two budgets, one round, elsewhere")
    made.add_argument("--answer", help=argparse.SUPPRESS)
    options = made.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


if __name__ == "__main__":
    main()
