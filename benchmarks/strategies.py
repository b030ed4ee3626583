"""What sampling, distillation and importance options are worth: short runs of stage 1 that differ in one setting.

    python benchmarks/strategies.py --text wikitext2_raw_test.txt --output runs/strategies

Every run goes through `main.py fit` on the embedded default, in a run folder of its own, so that a second call picks
up what is unfinished. The full network's loss is also measured on a text that nobody trained on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from text_loss import blocks_of, loss_on

from flextron_lit import checkpoint
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.sources import load_dense

CONFIGS = ("stages/elastic.yaml", "models/smollm2-135m.yaml", "data/embedded.yaml", "trainer/cpu.yaml")
SHOWN = ("full", "mlp75", "mlp50", "mlp25", "attention67")


def sampling(k: int = 1, **strategies: float) -> dict[str, Any]:
    """BudgetSampling with other strategies."""
    settings = {"k": k, **({"strategies": strategies} if strategies else {})}
    return {"trainer": {"callbacks": [{"class_path": "callbacks.BudgetSampling", "init_args": settings}]}}


def model(**settings: Any) -> dict[str, Any]:
    """Other arguments of the stage."""
    return {"model": {"init_args": settings}}


def distilled(**weights: float) -> dict[str, Any]:
    """Other distillation weights."""
    return model(distillation={"sampled_from_full": 1.0, "full_from_original": 1.0} | weights)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "independent": sampling(independent=1.0),
    "uniform": sampling(uniform=1.0),
    "independent and uniform": sampling(independent=1.0, uniform=1.0),
    "stratified": sampling(stratified=1.0),
    "stratified and uniform": sampling(stratified=1.0, uniform=1.0),
    "sandwich, k 2": sampling(k=2, sandwich=1.0),
    "independent, k 2": sampling(k=2, independent=1.0),
    "language loss alone": distilled(sampled_from_full=0.0),
    "distilled alone": distilled(language=0.0),
    "distilled from original": distilled(sampled_from_full=0.0, sampled_from_original=1.0),
    "full not guarded": distilled(full_from_original=0.0),
    "full weight 1 to 2": model(full_weight={"start": 1.0, "end": 2.0}),
    "sorted by outgoing": model(calibration={"importance": "outgoing"}),
    "not sorted": model(calibration={"tokens": 0}),
}
"""Settings on top of the quickstart's; with k 2 a run takes two thirds of the steps, for about the same work."""


def train(name: str, output: Path, steps: int, threads: int) -> Path:
    """Run one variant (or pick it up); returns its run folder."""
    folder = output / name.replace(" ", "_").replace(",", "")
    settings = VARIANTS[name]
    steps = steps * 2 // 3 if "k 2" in name else steps
    arguments = [part for config in CONFIGS for part in ("-c", f"configs/{config}")]
    if settings:
        arguments += ["-c", json.dumps(settings)]
    # all start alike, so one table before training would be the same in every run
    arguments += ["--trainer.num_sanity_val_steps", "0", "--trainer.max_steps", str(steps)]
    arguments += ["--run_folder", str(folder.absolute())]
    folder.mkdir(parents=True, exist_ok=True)
    with (output / f"{folder.name}.log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "main.py", "fit", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{name} failed; see {log.name}")
    print(f"{name}: {folder}", flush=True)
    return folder


def final_losses(folder: Path) -> dict[str, float]:
    """Sub-network to mean loss over domains after training."""
    rows = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    last = [row for row in rows if row["step"] == max(r["step"] for r in rows)]
    names = dict.fromkeys(row["sub_network"] for row in last)
    return {name: mean(row["loss"] for row in last if row["sub_network"] == name) for name in names}


def outside(folder: Path, text: Path, tokens: int) -> float:
    """Change of the full network's loss on an outside text, from the dense source."""
    flextron = folder / "flextron"
    source = checkpoint.read(flextron).history[0]["source"]
    blocks = blocks_of(text, source, tokens=tokens, block_size=512)
    before, after = (
        loss_on(backbone, backbone.space.full(), blocks, str(where))
        for where, backbone in ((w, ElasticBackbone(load_dense(w))) for w in (source, str(flextron)))
    )
    return after - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file to measure the full network on")
    parser.add_argument("--tokens", type=int, default=16384, help="first tokens of it")
    parser.add_argument("--output", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        folders = list(pool.map(lambda name: train(name, options.output, options.steps, 1), options.variants))
    table = Table(title=f"loss after {options.steps} steps, nats per token, mean over domains; seed 0")
    for column in ("variant", *SHOWN, "mean of 8", f"full on {options.text.stem}"):
        table.add_column(column, no_wrap=True)
    for name, folder in zip(options.variants, folders, strict=True):
        losses = final_losses(folder)
        cells = [f"{losses[shown]:.3f}" for shown in SHOWN]
        change = outside(folder, options.text, options.tokens)
        table.add_row(name, *cells, f"{mean(losses.values()):.3f}", f"{change:+.3f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
