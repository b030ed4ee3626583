"""What `main.py plan` says of a step beside what it takes: bytes of tensors, by torch's memory tracker.

    OMP_NUM_THREADS=1 python benchmarks/plan.py --check

Real stages with weights (random ones, of a small Llama and a small GPT-2) train for a step, and the tracker counts; the
plan is worked out from the config alone. `beside` are bytes of the peak that are not there before the step.
`--processes 2` measures elastic training shared out (fsdp2) by gloo; each of its processes counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
from bare_trainer import BARE
from gloo_ranks import run_ranks
from tensor_bytes import Bytes, keep_states

from flextron_lit import callbacks, checkpoint
from flextron_lit.costs import COUNTED, Workload
from flextron_lit.data import TextDataModule, TextDomain
from flextron_lit.elastic.sharding import own_part
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.planning.asked import TrainingSettings
from flextron_lit.planning.gpu import Gpu
from flextron_lit.planning.model_shape import shape_of
from flextron_lit.planning.plan import MEASURED, Planner
from flextron_lit.planning.stand_ins import BUDGET
from flextron_lit.routers.from_surrogate import train_router
from flextron_lit.space import SubNetwork
from flextron_lit.stages import (
    Calibration,
    Distillation,
    DynamicRouterTraining,
    ElasticTraining,
    JointTuning,
    Remeasuring,
    SurrogateTraining,
)

LIMIT = 0.1
GPUS = [1, 2]
SIZE = {"vocab_size": 16000, "num_hidden_layers": 6}
FAMILIES = {
    "llama": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
    | {"head_dim": 48},
    "gpt2": {"model_type": "gpt2", "n_embd": 384, "n_layer": 6, "n_head": 8, "n_positions": 512, "vocab_size": 16000}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None},
}
PLAIN = TrainingSettings(precision="32-true", batch_size=4, block_size=128)
ELASTIC = {
    "elastic": PLAIN,
    "elastic, checkpointing": replace(PLAIN, activation_checkpointing=True),
    "elastic, chunks of 64": replace(PLAIN, activation_checkpointing=True, optimizer="adamw_fused", loss_chunk=64),
    "elastic, distilled from the original": replace(PLAIN, from_original=True, optimizer="adamw_fused"),
    "elastic, nothing of their own, 8-bit": replace(PLAIN, compensation="none", optimizer="adamw_8bit"),
    "elastic, bf16-mixed": replace(PLAIN, precision="bf16-mixed"),
    "elastic, bf16-true": replace(PLAIN, precision="bf16-true"),
}


class Tracked(Callback):
    """Tracks a step, with what optimizers keep from the steps before."""

    def __init__(self, plan):
        self.plan = plan

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if isinstance(batch, torch.Tensor):
            # the surrogate's pairs: no network runs
            return
        pl_module.plan = self.plan(pl_module)
        keep_states(trainer.optimizers)
        self.tracker = Bytes()
        networks = (*pl_module.networks(), *getattr(pl_module, "routers", ()), getattr(pl_module, "router", None))
        there = [each for each in networks if each is not None]
        self.tracker.track_external(*there, *trainer.optimizers, *batch.values())
        states = (
            each for optimizer in trainer.optimizers for state in optimizer.state.values() for each in state.values()
        )
        held = (*(each for network in there for each in network.parameters()), *states)
        self.held = sum(own_part(each).nbytes for each in held if isinstance(each, torch.Tensor))
        self.tracker.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if isinstance(batch, torch.Tensor):
            return
        self.tracker.__exit__(None, None, None)
        self.found = {"peak": self.tracker.peak()["Total"], "held": self.held}


def widest_narrower(stage):
    return [SubNetwork(tuple(max(0, len(block.widths) - 2) for block in stage.backbone.space.blocks))]


def optimizer_of(settings):
    from bitsandbytes.optim import AdamW8bit

    if settings.optimizer == "adamw_8bit":
        return lambda parameters: AdamW8bit(parameters, lr=1e-5, weight_decay=0.0)
    # over all tensors at once, as on a GPU
    how = {"fused": True} if settings.optimizer == "adamw_fused" else {"foreach": True}
    return lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, **how)


def fit(stage, folder, settings, *more, plan=lambda _: [BUDGET], processes=1):
    """Train for a step; what it took."""
    text = TextDataModule(
        {"stories": TextDomain(source="generated:80,0")},
        tokenizer=str(folder),
        block_size=settings.block_size,
        batch_size=settings.batch_size,
    )
    tracked = Tracked(plan)
    strategy = {"devices": processes, "strategy": "fsdp2"} if processes > 1 else {}
    trainer = Trainer(
        **BARE | strategy, precision=settings.precision, callbacks=[tracked, *more], default_root_dir=folder / "run"
    )
    # stages that only measure losses ask for it themselves
    data = stage.attach(text)
    trainer.fit(stage, datamodule=data)
    return tracked.found if hasattr(tracked, "found") else None


def of_backbone(settings):
    distillation = Distillation(sampled_from_full=1.0, full_from_original=float(settings.from_original))
    chunk, checkpointing = settings.loss_chunk, settings.activation_checkpointing
    return {"distillation": distillation, "activation_checkpointing": checkpointing, "loss_chunk": chunk}


def elastic(folder, settings, *more, processes=1):
    calibration = Calibration(tokens=64, excess_tokens=0, importance="magnitude", compensation=settings.compensation)
    stage = ElasticTraining(
        f"random:{folder}", optimizer_of(settings), calibration=calibration, **of_backbone(settings)
    )
    return fit(stage, folder, settings, *more, plan=widest_narrower, processes=processes)


def routers(folder):
    """A checkpoint with all that later stages start from, none of it any good; and what measuring took."""
    elastic(folder, PLAIN, callbacks.FlextronCheckpointWriter())
    written = next(path.parent for path in folder.rglob("flextron.json"))
    surrogate = SurrogateTraining(
        str(written), pairs=8, held_out=2, tokens=64, block_size=32, batch_size=8, optimizer=torch.optim.AdamW
    )
    found = {}

    class Measuring(Callback):
        def on_train_start(self, trainer, pl_module):
            backbone, size = pl_module.backbone, (MEASURED.measure_batch_size, MEASURED.block_size)
            batch = {name: torch.zeros(size, dtype=torch.long) for name in ("input_ids", "position_ids", "labels")}
            batch["position_ids"] += torch.arange(size[1])
            tracker = Bytes()
            tracker.track_external(backbone.model, *batch.values())
            with tracker:
                MeasuredLoss(backbone, [batch])(backbone.space.full())
            found["surrogate"] = {
                "peak": tracker.peak()["Total"],
                "held": sum(each.nbytes for each in backbone.model.parameters()),
            }

    fit(surrogate, folder, PLAIN, Measuring())
    backbone = surrogate.backbone
    trained = replace(surrogate.trained, settings=surrogate.settings())
    router = train_router(backbone.space, COUNTED["flops"](backbone, Workload()), trained, steps=2, seed=0)
    files = surrogate.files() | router.files()
    checkpoint.extend(written, folder / "routed", files=files)
    return folder / "routed", found


def later_stages(folder):
    """What measuring, a dynamic router and joint tuning take."""
    routed, found = routers(folder)
    dynamic = DynamicRouterTraining(str(routed), cost="flops", calibration_tokens=64, prices=2, budgets=[0.9])
    found["dynamic_router"] = fit(dynamic, folder, PLAIN)
    few = Remeasuring(candidates=6, tokens=32, block_size=32)
    for name, settings in (("joint_tuning", PLAIN), ("joint_tuning, checkpointing", CHECKPOINTED)):
        joint = JointTuning(str(routed), optimizer_of(settings), remeasuring=few, **of_backbone(settings))
        found[name] = fit(joint, folder, settings)
    return found


CHECKPOINTED = replace(PLAIN, activation_checkpointing=True, optimizer="adamw_fused")


def planned(planner, stage, settings, strategy="one GPU", gpus=1):
    """Peak, and what is there before the step; tables are small and no part of what is tracked."""
    row = planner.row(stage, strategy, gpus, settings, advise=False)
    parts = {name: size for name, size in row.parts.items() if name != "tables"}
    held = sum(parts[name] for name in ("network", "own_projections", "original", "optimizer"))
    return {"peak": sum(parts.values()), "held": held}


def compare(name, measured, plan):
    """Print a row; how far the plan is off."""
    beside, expected = measured["peak"] - measured["held"], plan["peak"] - plan["held"]
    ratios = plan["peak"] / measured["peak"], expected / beside
    print(
        f"| {name} | {plan['peak'] / 1e6:.1f} | {measured['peak'] / 1e6:.1f} | {ratios[0]:.3f} | {expected / 1e6:.1f} "
        f"| {beside / 1e6:.1f} | {ratios[1]:.3f} |",
        flush=True,
    )
    return max(abs(ratio - 1) for ratio in ratios)


def shared_out(folder, processes):
    """What each of several processes takes."""
    run_ranks(__file__, folder, processes)
    found = [json.loads((folder / f"took-{rank}.json").read_text()) for rank in range(processes)]
    return max(found, key=lambda took: took["peak"])


def make(folder, family):
    """A model with no weights, and the planner for it."""
    tiny = ROOT / "configs/models/tiny-llama"
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    config = FAMILIES[family] if family == "gpt2" else json.loads((tiny / "config.json").read_text()) | SIZE
    (folder / "config.json").write_text(json.dumps(config | FAMILIES[family]), encoding="utf-8")
    return Planner.of(shape_of(str(folder / "config.json"), None, None), PLAIN, Gpu(), GPUS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=[*FAMILIES])
    parser.add_argument("--rows", nargs="*", choices=ELASTIC, default=[*ELASTIC], help="of elastic training")
    parser.add_argument("--check", action="store_true", help=f"exit 1 if a plan is off by more than {LIMIT:.0%}%")
    parser.add_argument("--processes", type=int, default=1, help="also shared out over so many")
    parser.add_argument("--later", action="store_true", help="also measuring, the dynamic router and joint tuning")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        took = elastic(options.folder, PLAIN, processes=options.count)
        (options.folder / f"took-{os.environ['RANK']}.json").write_text(json.dumps(took), encoding="utf-8")
        return
    print("| step | plan, MB | measured, MB | ratio | beside, plan | measured | ratio |\n|---|---|---|---|---|---|---|")
    worst = 0.0
    for family in options.families:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            planner = make(folder, family)
            for row in options.rows:
                settings = ELASTIC[row]
                plan = planned(planner, "elastic", settings)
                worst = max(worst, compare(f"{family}: {row}", elastic(folder, settings), plan))
            if options.processes > 1:
                plan = planned(planner, "elastic", PLAIN, "fsdp2", options.processes)
                took = shared_out(folder, options.processes)
                worst = max(worst, compare(f"{family}: elastic, fsdp2 on {options.processes}", took, plan))
            for row, took in later_stages(folder).items() if options.later else ():
                settings = CHECKPOINTED if row.endswith("checkpointing") else PLAIN
                plan = planned(planner, row.partition(",")[0], settings)
                worst = max(worst, compare(f"{family}: {row}", took, plan))
    if options.check and worst > LIMIT:
        raise SystemExit(f"off by {worst:.1%}")


if __name__ == "__main__":
    main()
