"""Every stage is built the same whatever device Lightning makes the default one, and runs on a GPU."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import Strategy

from flextron_lit import callbacks, checkpoint
from flextron_lit.stages import (
    Calibration,
    DynamicRouterTraining,
    ElasticTraining,
    JointTuning,
    Remeasuring,
    StaticRouterTraining,
    SurrogateTraining,
)
from tests.served import SPACE, TINY, write
from tests.stages.routers import fit, trainer_of
from tests.stages.training import text

ELSEWHERE = {
    "another default device": {"accelerator": "cpu"},
    "a GPU": {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed"},
}


@pytest.fixture(
    params=[
        "another default device",
        pytest.param(
            "a GPU",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
    ]
)
def elsewhere(request, monkeypatch):
    """Settings of a trainer that calls `configure_model` under another device than the processor."""
    if request.param == "another default device":
        # as a GPU's strategy does with its own; nothing that is made there by mistake can be computed with
        monkeypatch.setattr(Strategy, "tensor_init_context", lambda self, empty_init=None: torch.device("meta"))
    return ELSEWHERE[request.param]


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """A checkpoint with a surrogate and routers of both kinds, none of them trained."""
    folder = tmp_path_factory.mktemp("served")
    plain = write(folder / "plain")
    stage = surrogate_stage(plain)
    fit(stage, folder / "surrogate", max_steps=1)
    checkpoint.extend(plain, folder / "routed", files=stage.files())
    return folder / "routed"


def elastic_stage(folder):
    return ElasticTraining(TINY, space=SPACE, calibration=Calibration(tokens=256))


def surrogate_stage(folder):
    return SurrogateTraining(str(folder), pairs=16, held_out=4, tokens=128, block_size=32, batch_size=16)


def static_stage(folder):
    return StaticRouterTraining(str(folder), cost="flops", surrogate_batch_size=4)


def dynamic_stage(folder):
    return DynamicRouterTraining(str(folder), cost="flops", block_size=32, batch_size=4, calibration_tokens=256)


def joint_stage(folder):
    small = Remeasuring(candidates=6, tokens=128, block_size=32)
    return JointTuning(str(folder), router="static", remeasuring=small)


class Devices(Callback):
    """Where the backbone trains; after a run Lightning takes it back to the processor."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.add(pl_module.backbone.model.device.type)


@pytest.mark.parametrize("made", [elastic_stage, surrogate_stage, static_stage, dynamic_stage, joint_stage])
def test_a_stage_runs(made, elsewhere, routed, tmp_path):
    stage = made(routed)
    plan = [] if made is surrogate_stage else [callbacks.BudgetSampling(k=2)]
    guide = [callbacks.SurrogateGuidance(every_n_steps=1, threshold=1e9)] if made is static_stage else []
    devices = Devices()
    trainer = trainer_of(tmp_path, *plan, *guide, devices, max_steps=2, **elsewhere)
    if stage.trains_backbone:
        trainer.fit(stage, datamodule=text(tokenizer=stage.checkpoint))
    else:
        stage.attach(text(tokenizer=stage.checkpoint))
        trainer.fit(stage)
    assert trainer.global_step == 2
    assert devices.seen == {"cuda" if elsewhere["accelerator"] == "gpu" else "cpu"}
    assert all(p.isfinite().all() for p in stage.parameters())
