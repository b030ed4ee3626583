"""Every precision of the trainer: losses stay right, and what is no weight of the backbone keeps its type."""

from functools import cache

import pytest
import torch
from lightning.pytorch import Trainer

from flextron_lit import callbacks
from flextron_lit.stages import (
    DynamicRouterTraining,
    ElasticTraining,
    JointTuning,
    StaticRouterTraining,
    SurrogateTraining,
)
from flextron_lit.stages.tuned_router import Remeasuring
from flextron_lit.stages.validation import ValidationSet
from tests.checkpoint.test_earlier import EARLIER
from tests.stages import training

FOLDER = str(EARLIER / "flextron")
TRUE = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
TYPES = {**TRUE, "bf16-mixed": torch.float32}
TOKENS = 960
STAGES = {
    "elastic": lambda: ElasticTraining(FOLDER, validation=ValidationSet(random_costs=[])),
    "surrogate": lambda: SurrogateTraining(FOLDER),
    "static": lambda: StaticRouterTraining(FOLDER, cost="flops"),
    "dynamic": lambda: DynamicRouterTraining(FOLDER, cost="flops"),
    "joint": lambda: JointTuning(FOLDER, router="both", cost="flops"),
}


def trainer_of(precision, **settings):
    return Trainer(
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def text():
    return training.text(tokenizer=FOLDER, batch_size=4, validation_tokens=TOKENS)


def validated(stage, precision):
    trainer = trainer_of(precision)
    # in blocks of their own, so that there are many sums to add up
    datamodule = stage.attach(text())
    found = trainer.validate(stage, datamodule=datamodule, verbose=False)
    return {name: value for each in found for name, value in each.items()}


@pytest.fixture(scope="module")
def exact():
    """What a stage validates in float32, made once for each."""
    return cache(lambda kind: validated(STAGES[kind](), "32-true"))


ALWAYS = [("elastic", "bf16-true"), ("surrogate", "bf16-true"), ("joint", "bf16-true"), ("elastic", "64-true")]
CASES = [(kind, precision) for kind in STAGES for precision in TYPES if precision != "32-true"]


@pytest.mark.parametrize(
    ("kind", "precision"), [pytest.param(*each, marks=() if each in ALWAYS else pytest.mark.slow) for each in CASES]
)
def test_a_stage_validates_in_it(kind, precision, exact):
    stage = STAGES[kind]()
    found = validated(stage, precision)
    names = [name for name in found if name.endswith(("/loss", "rank_correlation"))]
    assert names
    for name in names:
        # tokens of a dynamic router may choose otherwise; elsewhere only the passes round
        assert found[name] == pytest.approx(exact(kind)[name], rel=0.02 if "dynamic" in name else 2e-3)
    assert {parameter.dtype for parameter in stage.backbone.model.parameters()} == {TYPES[precision]}
    assert stage.backbone.model.model.rotary_emb.inv_freq.dtype == torch.float32
    for name in ("router", "routers", "surrogate"):
        assert {value.dtype for value in getattr(stage, name, torch.nn.Module()).parameters()} <= {torch.float32}
    if hasattr(stage, "losses"):
        assert stage.losses.total.dtype == torch.float64
        assert torch.get_default_dtype() == torch.float32
    costs = {name: value for name, value in found.items() if name.endswith("/cost")}
    assert costs == pytest.approx({name: exact(kind)[name] for name in costs}, rel=0.05)


def test_a_stage_trains_in_bf16_and_its_routers_in_float32():
    small = Remeasuring(candidates=6, tokens=64, block_size=32)
    stage = JointTuning(FOLDER, router="both", cost="flops", remeasuring=small)
    made = []
    # what a step makes by default: budgets and noise among others
    stage.add_loss_term("noted", lambda done: made.append(torch.zeros(1).dtype) or torch.zeros(()))
    trainer = trainer_of("bf16-true", max_steps=1, limit_val_batches=0, callbacks=[callbacks.BudgetSampling()])
    trainer.fit(stage, datamodule=text())
    assert set(made) == {torch.float32}
    assert trainer.global_step == 1
    assert stage.backbone.model.dtype == torch.bfloat16
    assert {each.dtype for each in stage.routers.parameters()} == {torch.float32}
    # the widths that a ladder says cost what the table says, to the last bit
    table = stage.tuned[0].table
    assert [rung.cost for rung in stage.ladder.rungs] == [table.cost(rung.sub_network) for rung in stage.ladder.rungs]


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_fp16_is_refused_in_training_before_anything_is_loaded(precision, monkeypatch):
    stage = ElasticTraining("nowhere")
    trainer = trainer_of("32-true", max_steps=1)
    monkeypatch.setattr(type(trainer), "precision", precision)
    with pytest.raises(ValueError, match=rf"trainer.precision {precision} is not supported in training; .*bf16-mixed"):
        trainer.fit(stage, datamodule=text())
