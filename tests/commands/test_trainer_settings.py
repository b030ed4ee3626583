"""Settings of the trainer that cannot work here: one line, before anything is loaded; what can, is let through."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer import call

from flextron_lit import callbacks
from flextron_lit.commands.fit import one_line
from flextron_lit.commands.trainer_settings import OWNED, check_callbacks, check_end, check_options
from flextron_lit.stages import ElasticTraining, StaticRouterTraining, SurrogateTraining
from flextron_lit.stages.precision import check_precision

DOMAINS = ["stories", "re/ports"]
OPTIONS = {
    **dict.fromkeys(OWNED),
    "accumulate_grad_batches": 1,
    "enable_checkpointing": None,
    "precision": "32-true",
    "strategy": "auto",
    "max_steps": 2,
    "max_epochs": None,
    "max_time": None,
    "limit_train_batches": None,
    "limit_val_batches": None,
    "limit_test_batches": 1.0,
}


def options(**settings):
    return Namespace(OPTIONS | settings)


@pytest.mark.parametrize(
    ("settings", "command", "message"),
    [
        ({"overfit_batches": 2}, "fit", "overfit_batches cannot be set"),
        ({"barebones": True}, "fit", "barebones cannot be set"),
        ({"enable_checkpointing": False}, "fit", "enable_checkpointing cannot be false"),
        ({"accumulate_grad_batches": 2}, "fit", "use model.init_args.accumulate"),
        ({"precision": "transformer-engine"}, "fit", "transformer-engine replaces the layers that are elastic"),
        ({"precision": "transformer-engine-float16"}, "validate", "replaces the layers that are elastic"),
        ({"max_steps": 0}, "fit", "max_steps is 0: fit would do nothing"),
        ({"max_epochs": 0}, "fit", "max_epochs is 0"),
        ({"limit_train_batches": 0.0}, "fit", "limit_train_batches is 0"),
        ({"limit_val_batches": 0}, "validate", "limit_val_batches is 0: validate would do nothing"),
        ({"limit_test_batches": 0}, "test", "limit_test_batches is 0"),
    ],
)
def test_an_option_that_cannot_work_is_refused(settings, command, message):
    with pytest.raises(ValueError, match=message) as error:
        check_options(options(**settings), command)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fitting", [True, False])
def test_layers_that_are_packed_as_they_are_made_are_refused(fitting):
    with pytest.raises(ValueError, match="BitsandbytesPrecision replaces the layers that are elastic") as error:
        check_precision("32-true", [BitsandbytesPrecision("nf4")], fitting=fitting)
    assert "\n" not in str(error.value)
    # the control
    check_precision("32-true", [Precision()], fitting=fitting)


def lightnings(name, **settings):
    return {"class_path": f"lightning.pytorch.strategies.{name}", "init_args": settings}


SPAWNED = "in processes whose results this one does not get"
BY_NAME = {
    "fsdp": "is FSDP1, which makes one flat tensor",
    "fsdp_cpu_offload": "is FSDP1",
    "deepspeed": "makes the updates itself",
    "deepspeed_stage_2": "makes the updates itself",
    "ddp_spawn": SPAWNED,
    "ddp_fork": SPAWNED,
    "ddp_notebook_find_unused_parameters_true": SPAWNED,
    "xla": "is for TPUs",
}
CLASSES = [
    (lightnings("FSDPStrategy"), "is FSDP1"),
    (lightnings("DDPStrategy", start_method="spawn"), SPAWNED),
    (lightnings("ModelParallelStrategy"), "splits weights within a layer"),
    (lightnings("ModelParallelStrategy", tensor_parallel_size=2, data_parallel_size=1), "splits weights"),
    (lightnings("ModelParallelStrategy", tensor_parallel_size=1), "a data_parallel_size of auto"),
]
ACCEPTED = [
    *("auto", "ddp", "fsdp2", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false", "single_device"),
    lightnings("DDPStrategy"),
    lightnings("ModelParallelStrategy", tensor_parallel_size=1, data_parallel_size=2),
    "flextron_lit.stages.fully_sharded.FullySharded",
    {"class_path": "mine.Own"},
]


@pytest.mark.parametrize(("strategy", "reason"), [*BY_NAME.items(), *CLASSES])
def test_a_strategy_that_would_not_train_together_is_refused(strategy, reason):
    with pytest.raises(ValueError, match=reason) as error:
        check_options(options(strategy=strategy), "fit")
    assert "\n" not in str(error.value)
    assert "take ddp" in str(error.value)


def test_every_strategy_of_lightning_has_an_answer():
    # by those that are named here: a new one is to be thought about
    names = {name.split("_", 1)[0] if name.startswith(("ddp", "deepspeed")) else name for name in StrategyRegistry}
    named = {*BY_NAME, *(each for each in ACCEPTED if isinstance(each, str)), "single_tpu", "single_xla", "xla_debug"}
    assert names <= named


def test_options_that_work_go_through():
    for strategy in ACCEPTED:
        check_options(options(strategy=strategy), "fit")
    check_options(options(precision="bf16-true", limit_val_batches=0, max_epochs=3), "fit")
    check_options(options(limit_train_batches=0, max_steps=0), "validate")


@pytest.mark.parametrize(
    ("settings", "chosen", "ends"),
    [
        ({"max_steps": 2}, [], True),
        ({"max_steps": -1, "max_epochs": 1}, [], True),
        ({"max_steps": -1, "max_time": "00:00:01:00"}, [], True),
        ({"max_steps": -1}, [Timer("00:00:01:00")], True),
        ({"max_steps": -1}, [Timer()], False),
        ({"max_steps": -1}, [], False),
    ],
)
def test_a_run_has_an_end(settings, chosen, ends):
    if ends:
        check_end(options(**settings), chosen)
        return
    with pytest.raises(ValueError, match="nothing says how long to train: add --trainer.max_steps"):
        check_end(options(**settings), chosen)


def elastic():
    return ElasticTraining("nowhere")


def chosen(*more):
    return [callbacks.BudgetSampling(), *more, callbacks.FlextronCheckpointWriter(), callbacks.ExactResume()]


REFUSED = {
    "SWA": (lambda: StochasticWeightAveraging(0.1), "StochasticWeightAveraging cannot work here: .*EMAWeightAveraging"),
    "rates": (LearningRateFinder, "LearningRateFinder cannot work here"),
    "batch sizes": (BatchSizeFinder, "set data.init_args.batch_size"),
    "accumulation": (lambda: GradientAccumulationScheduler({0: 2}), "set model.init_args.accumulate"),
    "pruning": (lambda: ModelPruning("l1_unstructured"), "set the widths with model.init_args.space"),
    "freezing": (BackboneFinetuning, "set model.init_args.trained"),
    "spikes": (SpikeDetection, "stops before an update"),
    "two draws": (callbacks.BudgetSampling, "there are two BudgetSampling"),
    "two of a subclass": (lambda: type("Own", (callbacks.BudgetSampling,), {})(k=2), "there are two BudgetSampling"),
    "two writers": (callbacks.FlextronCheckpointWriter, "there are two FlextronCheckpointWriter"),
    "another's metric": (lambda: EarlyStopping("val_loss"), "EarlyStopping waits for val_loss, which is not logged"),
    "a domain's metric": (lambda: EarlyStopping("val/full/poems/loss"), "waits for val/full/poems/loss"),
    "a surrogate's metric": (
        lambda: ModelCheckpoint(monitor="val/surrogate/rank_correlation"),
        "ModelCheckpoint waits",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_callback_that_cannot_work_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        check_callbacks(chosen(make()), elastic(), DOMAINS)
    assert "\n" not in str(error.value)


def test_two_of_lightnings_with_one_state_are_refused():
    with pytest.raises(ValueError, match="there are two EarlyStopping in trainer.callbacks"):
        check_callbacks(chosen(*(EarlyStopping("val/full/mean/loss") for _ in "12")), elastic(), DOMAINS)
    check_callbacks(chosen(*(EarlyStopping("val/full/mean/loss", mode=m) for m in ("min", "max"))), elastic(), DOMAINS)


def test_callbacks_that_work_go_through():
    names = ("val/full/stories/loss", "val/mlp50/re/ports/perplexity", "train/full/loss", "val/random0.80/mean/loss")
    waiting = [EarlyStopping(name) for name in names]
    check_callbacks(chosen(*waiting, Timer(), LearningRateMonitor(), ModelCheckpoint()), elastic(), DOMAINS)
    surrogate = SurrogateTraining("nowhere")
    check_callbacks([EarlyStopping("val/surrogate/error_over_std")], surrogate, DOMAINS)
    # what is absent may be said not to matter
    check_callbacks(chosen(EarlyStopping("val_loss", strict=False)), elastic(), DOMAINS)


class Own(Callback):
    """Of a user: may log, plan and guide."""


def test_what_lacks_a_plan_or_a_guide_is_refused_unless_a_callback_of_the_user_may_make_it():
    with pytest.raises(ValueError, match="nothing draws sub-networks to train: add callbacks.BudgetSampling"):
        check_callbacks([], elastic(), DOMAINS)
    router = StaticRouterTraining("nowhere")
    with pytest.raises(ValueError, match="nothing guides the router: add callbacks.SurrogateGuidance"):
        check_callbacks(chosen(), router, DOMAINS)
    check_callbacks([Own(), EarlyStopping("mine")], elastic(), DOMAINS)
    check_callbacks(chosen(callbacks.SurrogateGuidance()), router, DOMAINS)
    check_callbacks(chosen(), StaticRouterTraining("nowhere", through_backbone=True), DOMAINS)


def test_averages_are_of_weights_alone_and_the_last_is_kept():
    averaging = EMAWeightAveraging()
    check_callbacks(chosen(averaging), elastic(), DOMAINS)
    assert not averaging._use_buffers
    best = [callbacks.BudgetSampling(), EMAWeightAveraging(), callbacks.FlextronCheckpointWriter(keep="best")]
    with pytest.raises(ValueError, match="EMAWeightAveraging .* keep best .*: set keep to last"):
        check_callbacks(best, elastic(), DOMAINS)


def test_a_timers_default_is_plain_yaml():
    assert yaml.safe_load(yaml.safe_dump({"interval": Timer()._interval})) == {"interval": "step"}


def test_what_a_callback_finds_wrong_is_one_line():
    class Broken(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise RuntimeError("one\n  two")

    profiler = SimpleNamespace(profile=lambda name: nullcontext())
    trainer = SimpleNamespace(callbacks=[Broken()], lightning_module=None, profiler=profiler)
    with pytest.raises(ValueError, match="^Broken: one two$"), one_line():
        call._call_callback_hooks(trainer, "on_fit_start")
    # the control: elsewhere it is a fault of ours
    with pytest.raises(RuntimeError, match="ours"), one_line():
        raise RuntimeError("ours")
