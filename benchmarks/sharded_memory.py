"""Bytes of parameters, gradients and optimizer that each process holds, by how many share the network out (fsdp2).

    python benchmarks/sharded_memory.py --processes 1 2 4 --check

One step of elastic training of a random Llama with projections of its own for narrower widths, in which every width is
drawn, so that every parameter has a gradient and AdamW its two moments; counted before the update and behind it. On the
processor, by gloo: bytes are those of any device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from gloo_ranks import run_ranks

LIMIT = 0.1
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
}


def count(folder: Path, processes: int) -> None:
    """Of one process: train, and write down what it holds."""
    from bare_trainer import BARE
    from lightning.pytorch import Callback, Trainer

    from flextron_lit.data import TextDataModule, TextDomain
    from flextron_lit.elastic.sharding import own_part
    from flextron_lit.stages import Calibration, ElasticTraining

    held: dict[str, int] = {}

    class Counting(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            space = pl_module.backbone.space
            pl_module.plan = [space.uniform(ratio, ratio) for ratio in (0.25, 0.5, 0.75)]

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            parameters = list(pl_module.model.parameters())
            held["all parameters"] = sum(each.numel() for each in parameters)
            held["parameters"] = sum(own_part(each).nbytes for each in parameters)
            held["gradients"] = sum(own_part(each.grad).nbytes for each in parameters)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            states = trainer.optimizers[0].state.values()
            held["optimizer"] = sum(own_part(each).nbytes for state in states for each in state.values())

    model = f"random:{folder}"
    text = TextDataModule(
        {"stories": TextDomain(source="generated:60,0")}, tokenizer=model, block_size=16, batch_size=1
    )
    trainer = Trainer(**BARE, devices=processes, strategy="fsdp2" if processes > 1 else "auto", callbacks=[Counting()])
    stage = ElasticTraining(model, calibration=Calibration(tokens=16, excess_tokens=0, importance="magnitude"))
    trainer.fit(stage, datamodule=text)
    (folder / f"{processes}-{trainer.global_rank}.json").write_text(json.dumps(held), encoding="utf-8")


def start(folder: Path, processes: int) -> list[dict[str, int]]:
    """All processes of a run; what each of them holds."""
    run_ranks(__file__, folder, processes)
    return [json.loads((folder / f"{processes}-{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--check", action="store_true", help=f"exit 1 if a share is off by more than {LIMIT:.0%}%")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        count(options.folder, options.count)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny = ROOT / "configs/models/tiny-llama"
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        config = json.loads((tiny / "config.json").read_text()) | SHAPE
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        found = {processes: start(folder, processes) for processes in options.processes}
    kinds = ("parameters", "gradients", "optimizer")
    alone = found[min(found)][0]
    print(f"{alone['all parameters'] / 1e6:.1f}M parameters\n\n| processes | {' | '.join(kinds)} | all | share |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for processes, ranks in found.items():
        # of the process that holds most
        most = max(ranks, key=lambda held: sum(held[kind] for kind in kinds))
        everything = sum(most[kind] for kind in kinds)
        share = everything / sum(alone[kind] for kind in kinds)
        worst = max(worst, abs(share * processes / min(found) - 1))
        cells = " | ".join(f"{most[kind] / 1e6:.1f} MB" for kind in kinds)
        print(f"| {processes} | {cells} | {everything / 1e6:.1f} MB | {share:.4f} |")
    if options.check and worst > LIMIT:
        raise SystemExit(f"off by {worst:.1%}")


if __name__ == "__main__":
    main()
