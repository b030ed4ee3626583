"""Runs that one process makes with all of a batch, and two with half of it each: what they end with, to compare."""

import os
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.nn.parallel import DistributedDataParallel

from flextron_lit import callbacks
from flextron_lit.costs import Workload
from flextron_lit.elastic.sharding import own_part, whole
from flextron_lit.latency.block_times import profile
from flextron_lit.losses.cross_entropy import IGNORED
from flextron_lit.sources import load_tokenizer
from flextron_lit.stages import (
    Calibration,
    DynamicRouterTraining,
    ElasticTraining,
    JointTuning,
    Remeasuring,
    StaticRouterTraining,
    SurrogateTraining,
    ranks_together,
)
from flextron_lit.stages.objective import Distillation
from flextron_lit.stages.validation import ValidationSet
from tests.conftest import make_gpt2
from tests.stages import routers, training
from tests.stages.training import SPACE, TINY, text

STEPS = 4
BATCH = 4
"""Blocks of a step, of all processes."""
WATCHED = ValidationSet(random_costs=[])
"""Of a tiny model's few sub-networks there is none at every cost."""


def adamw(parameters):
    # so large that steps on other gradients lead elsewhere
    return torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.01)


def elastic(start, **settings):
    distilled = Distillation(full_from_original=0.5, sampled_from_full=0.5)
    defaults = {"distillation": distilled, "accumulate": 2, "clip_norm": 0.5, "optimizer": adamw, "validation": WATCHED}
    return ElasticTraining(start, **(defaults | settings)), [callbacks.BudgetSampling(k=2)]


def compensation(start):
    return elastic(start, trained="compensation", distillation=Distillation(sampled_from_full=1.0))


def checkpointed(start):
    return elastic(start, activation_checkpointing=True)


def surrogate(start):
    sizes = {"pairs": 9, "held_out": 4, "tokens": 64, "block_size": 32, "batch_size": 4}
    return SurrogateTraining(start, **sizes), []


def static(start):
    stage = StaticRouterTraining(start, cost="flops")
    guidance = callbacks.SurrogateGuidance(every_n_steps=1, pairs=3, window=4, threshold=1e9)
    return stage, [callbacks.BudgetSampling(k=2), guidance]


def through_backbone(start):
    stage = StaticRouterTraining(start, cost="flops", through_backbone=True)
    return stage, [callbacks.BudgetSampling(k=2)]


def dynamic(start):
    small = {"cost": "flops", "block_size": 32, "batch_size": 4, "calibration_tokens": 96, "prices": 2}
    return DynamicRouterTraining(start, **small), [callbacks.BudgetSampling(k=2)]


def joint(start, router="static", **settings):
    small = Remeasuring(candidates=6, tokens=96, block_size=32)
    stage = JointTuning(
        start, router=router, cost="flops", optimizer=adamw, clip_norm=0.5, remeasuring=small, **settings
    )
    return stage, [callbacks.BudgetSampling(k=2)]


def both_routers(start):
    return joint(start, "both")


def drawn_widths(start):
    return joint(start, "both", train_router=False)


def latencies(start):
    """Budgets drawn evenly over what the first process has measured."""
    stage, _ = elastic(start, accumulate=1)
    request = Workload(batch_size=1, prompt_tokens=8, generated_tokens=2)
    profiling = callbacks.LatencyProfiling(request, seconds=0.2, held_out=2, recheck=0)
    return stage, [profiling, callbacks.BudgetSampling(k=2, cost="latency", strategies={"stratified": 1})]


STAGES = (
    *("elastic", "compensation", "checkpointed", "surrogate", "static", "through_backbone", "dynamic", "joint"),
    *("both_routers", "drawn_widths"),
)
"""Every stage, by the names of what makes them here."""
ALIKE = ("surrogate", "static")
"""Of these processes all compute the same: there is nothing to reduce, and nothing goes wrong without it."""
FAMILIES = ("llama", "gpt2")


def dense(family, folder):
    """A tiny model of a family, and where it lies."""
    if family == "llama":
        return TINY
    tokenizer = load_tokenizer(TINY)
    make_gpt2(vocab_size=260, hidden_size=64, n_inner=128, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def prepared(model, folder):
    """A checkpoint with own projections, a surrogate and both kinds of router, all of them barely trained."""
    there, writer = str(folder / "flextron"), callbacks.FlextronCheckpointWriter
    calibration = Calibration(tokens=128, excess_tokens=64)
    how = {"space": SPACE, "optimizer": adamw, "calibration": calibration, "clip_norm": 1e9, "validation": WATCHED}
    module = ElasticTraining(model, **how)
    drawn = callbacks.BudgetSampling(k=2)
    training.fit(module, drawn, writer(), steps=3, default_root_dir=folder)
    sizes = {"pairs": 32, "held_out": 4, "tokens": 128, "block_size": 32, "batch_size": 16}
    routers.fit(SurrogateTraining(there, **sizes), folder, writer(), max_epochs=2)
    guidance = callbacks.SurrogateGuidance(every_n_steps=5, pairs=3, window=4, threshold=1e9)
    routers.fit(StaticRouterTraining(there, cost="flops"), folder, drawn, guidance, writer(), max_steps=6)
    small = {"block_size": 32, "batch_size": 4, "calibration_tokens": 96, "prices": 2}
    routers.fit(DynamicRouterTraining(there, cost="flops", **small), folder, drawn, writer(), max_steps=2)
    return there


class LostOn(Callback):
    """On one rank, the loss of the second step is no number."""

    def __init__(self, rank):
        self.rank = rank

    def on_fit_start(self, trainer, pl_module):
        wrong = trainer.global_rank == self.rank
        pl_module.add_loss_term(
            "lost", lambda done: torch.tensor(float("nan") if wrong and trainer.global_step else 0.0)
        )


def lost(start):
    stage, others = elastic(start, accumulate=1)
    return stage, [*others, LostOn(1)]


class Notes(Callback):
    """The plan and losses of every step, the losses of every validation, and all weights before each step."""

    def __init__(self, before):
        self.before = before
        self.plans, self.steps, self.losses, self.weights = [], [], [], {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.before:
            self.weights = weights_of(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.plans.append([getattr(each, "choices", each) for each in pl_module.plan])
        losses = {name: float(value) for name, value in pl_module.parts.means().items() if is_loss(name)}
        if outputs:
            losses["surrogate_error"] = float(outputs["loss"])
        counted = int((batch["labels"][:, 1:] != IGNORED).sum()) if isinstance(batch, dict) else 1
        self.steps.append((counted, losses))

    def on_validation_end(self, trainer, pl_module):
        if pl_module.result is not None:
            self.losses.append(pl_module.result.losses)


def is_loss(name):
    """Whether a part of a step's loss is a mean over what this process predicted."""
    return name.rpartition("/")[2] in ("loss", "language", "surrogate_error", "predicted_loss") or "kl_" in name


def of_all(ranks):
    """Losses of every step over the tokens of all processes."""
    found = []
    for turn in zip(*(rank["steps"] for rank in ranks), strict=True):
        tokens = sum(counted for counted, _ in turn)
        names = turn[0][1]
        found.append({name: sum(counted * losses[name] for counted, losses in turn) / tokens for name in names})
    return found


def weights_of(stage):
    """Whole ones, and those of a frozen network too."""
    named = [*stage.named_parameters(), *((f"frozen.{n}", p) for n, p in stage.backbone.model.named_parameters())]
    return {name: whole(parameter.detach()).clone() for name, parameter in named}


def held(stage):
    """Bytes of weights that this process has, without what lies outside layers: a tiny model's embedding is most."""
    return sum(own_part(p).nbytes for name, p in stage.backbone.model.named_parameters() if ".layers." in name)


def measured(stage):
    """The sub-networks whose losses a surrogate learned from."""
    pairs = getattr(stage, "pairs", None) or getattr(getattr(stage, "trained", None), "pairs", None)
    return [] if pairs is None else pairs.choices.tolist()


def trained(made, start, folder, strategy="auto", world=1, *, nodes=1, before=True, **settings):
    """What a run ends with, or was stopped by: plans, losses, and every weight as a whole."""
    stage, others = made(start)
    notes, error = Notes(before), None
    if isinstance(stage, DynamicRouterTraining):
        stage.options.__dict__["batch_size"] = BATCH // world
    defaults = {
        "precision": "64-true",
        "max_steps": STEPS,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    trainer = Trainer(
        accelerator="cpu",
        devices=world // nodes,
        num_nodes=nodes,
        strategy=strategy,
        default_root_dir=folder,
        callbacks=[*others, notes, callbacks.FlextronCheckpointWriter()],
        **(defaults | settings),
    )
    # three blocks of a domain: in the second turn one of two processes has none
    data = stage.attach(text(tokenizer=start, batch_size=BATCH // world, validation_tokens=96))
    try:
        trainer.fit(stage, datamodule=data)
    except ValueError as stopped:
        error = str(stopped)
    now = weights_of(stage)
    return {
        "plans": notes.plans,
        "steps": notes.steps,
        "measured": measured(stage),
        "losses": notes.losses,
        "before": notes.weights,
        "weights": now,
        "held": held(stage),
        "latency": stage.latency and stage.latency.to_json(),
        "error": error,
    }


@contextmanager
def by_itself():
    """Leave out what makes processes train together."""
    together = ranks_together.RanksTogether
    with (
        mock.patch.object(ranks_together, "shard"),
        mock.patch.object(together, "unreduced", return_value=[]),
        # as within its own no_sync
        mock.patch.object(DistributedDataParallel, "require_backward_grad_sync", property(no, no), create=True),
    ):
        yield


def no(*_):
    """Whatever is asked or set."""
    return False


@contextmanager
def unnoticed():
    """The same, and leave out the check that would say so."""
    with by_itself(), mock.patch.object(ranks_together.RanksTogether, "check_gradients_agree"):
        yield


def compare(folder, start, jobs, **settings):
    """Of two processes: train, a list of (strategy, name), and keep what each ends with."""
    for strategy, name in jobs:
        # losses that are known are not measured
        os.environ["FLEXTRON_CACHE"] = str(Path(folder, strategy, "cache"))
        found = trained(globals()[name], start, Path(folder, strategy, name), strategy, 2, **settings)
        keep(folder, f"{strategy}-{name}", found)


def compare_and_go_wrong(folder, start, jobs):
    """Likewise, and runs that must not go on."""
    compare(folder, start, jobs)
    quick = {"limit_val_batches": 0, "max_steps": 3}
    for strategy in ("ddp", "fsdp2"):
        keep(folder, f"{strategy}-lost", trained(lost, start, folder, strategy, 2, **quick))
    lightning = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    keep(folder, "lightning", trained(elastic, start, folder, lightning, 2, **quick, precision="32-true"))
    with mock.patch("flextron_lit.callbacks.latency_profiling.profile", side_effect=profile) as measured:
        timed = trained(latencies, start, folder, "ddp", 2, **quick)
    keep(folder, "measured", timed | {"measured": measured.call_count})
    for precision in ("bf16-mixed", "bf16-true"):
        found = trained(elastic, start, folder, "fsdp2", 2, **quick, precision=precision)
        keep(folder, f"fsdp2-{precision}", found)
    with by_itself():
        keep(folder, "alone", trained(elastic, start, folder, "fsdp2", 2, **quick))
    with unnoticed():
        keep(folder, "unnoticed", trained(elastic, start, folder, "fsdp2", 2))


def keep(folder, name, found):
    torch.save(found, Path(folder, f"{name}-rank{torch.distributed.get_rank()}.pt"))
