"""Layers that may be skipped as a whole, found as a network is converted."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from flextron_lit.callbacks import BudgetSampling
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.evaluation.networks import ways_of
from flextron_lit.losses.measured_loss import mean_loss
from flextron_lit.sources import load_dense
from flextron_lit.space import ElasticSpace, SpaceConfig
from flextron_lit.stages import Calibration, ElasticTraining, skipped_layers
from flextron_lit.stages.conversion import convert, convert_model
from flextron_lit.stages.skipped_layers import SLACK, losses_without, without
from tests.conftest import make_llama
from tests.stages.training import SPACE, TINY, text

WIDTHS = SpaceConfig(mlp=[32, 64, 128], attention=[1, 2, 4])
CALIBRATION = Calibration(tokens=256, excess_tokens=128, skips=0.4)
"""Of three layers, of which the first one's attention always runs: one."""


def skipped(space: ElasticSpace) -> list[int]:
    """Layers that may be skipped."""
    both = zip(space.blocks[::2], space.blocks[1::2], strict=True)
    return [attention.layer for attention, mlp in both if attention.widths[0] == mlp.widths[0] == 0]


def prepared():
    found = text()
    found.prepare_data()
    return found


def test_layers_go_in_the_order_of_what_the_loss_says_with_those_before_them_gone():
    backbone, batches = ElasticBackbone(load_dense(TINY), WIDTHS), prepared().calibration_batches(128, batch_size=1)

    def added(gone, layer):
        with without(backbone, gone):
            before = mean_loss(backbone.model, batches)
        with without(backbone, [*gone, layer]):
            return mean_loss(backbone.model, batches) - before

    found = losses_without(backbone, batches, 2)
    first, second = found
    assert {first, second} == {1, 2}
    assert added([], first) <= added([], second)
    assert found == pytest.approx({first: added([], first), second: added([first], second)}, abs=1e-5)
    # the control: what a layer adds depends on those that are gone
    assert found[second] != pytest.approx(added([], second), abs=1e-7)


@pytest.mark.parametrize(("slack", "order"), [(SLACK, [1, 3, 2]), (1.0, [1, 2, 3])])
def test_a_layer_that_adds_less_since_its_neighbour_is_gone_is_found(slack, order, monkeypatch):
    """The control: lazily, one that added more before than the best one does now would be passed over."""
    gone = set()
    alone = {1: 0.10, 2: 0.15, 3: 0.18}

    @contextmanager
    def left_out(_, layers):
        gone.update(layers)
        yield
        gone.clear()

    def lost(_):
        cheaper = 0.13 if {1, 3} <= gone else 0.0
        return sum(alone[layer] for layer in gone) - cheaper

    monkeypatch.setattr(skipped_layers, "SLACK", slack)
    monkeypatch.setattr(skipped_layers, "without", left_out)
    monkeypatch.setattr(skipped_layers, "MeasuredLoss", lambda *_: lost)
    found = losses_without(ElasticBackbone(make_llama(num_hidden_layers=4)), [], 3)
    assert list(found) == order
    assert sum(found.values()) == pytest.approx(0.30)


def test_no_more_layers_go_than_can():
    with pytest.raises(ValueError, match=r"3 of 3 layers cannot be skipped: .* layers 0; set .* to 0\.67 or less"):
        losses_without(ElasticBackbone(load_dense(TINY), WIDTHS), [], 3)


def test_conversion_finds_them_and_what_they_lose():
    backbone = ElasticBackbone(load_dense(TINY), WIDTHS)
    given = backbone.space
    found = convert(backbone, prepared(), CALIBRATION)
    plain = convert(backbone, prepared(), Calibration(tokens=256, excess_tokens=128))
    assert plain.space == given
    assert plain.excess.layers == {}
    assert skipped(found.space) == list(found.excess.layers) != []
    rows = list(zip(found.space.blocks, found.excess.blocks, plain.excess.blocks, strict=True))
    assert all(len(row) == len(block.widths) for block, row, _ in rows)
    assert all(row[-len(without) :] == without for _, row, without in rows)


def test_the_network_is_the_dense_one_and_runs_without_that_layer():
    dense, backbone = load_dense(TINY).eval(), ElasticBackbone(load_dense(TINY).eval(), WIDTHS)
    built = convert(backbone, prepared(), CALIBRATION).build(backbone)
    (layer,) = skipped(built.space)
    ids = torch.arange(24).view(1, -1)
    assert torch.allclose(built.model(ids).logits, dense(ids).logits, atol=1e-5)
    absent = built.space.full().replace(2 * layer, 0).replace(2 * layer + 1, 0)
    with built.use(absent):
        skips = built.model(ids).logits
    del dense.model.layers[layer]
    assert torch.allclose(skips, dense(ids, use_cache=False).logits, atol=1e-5)
    assert not torch.allclose(skips, built.model(ids).logits, atol=1e-3)


def test_a_checkpoint_holds_them(tmp_path):
    made = convert_model(TINY, tmp_path / "converted", prepared(), WIDTHS, CALIBRATION)
    read = load_elastic(str(tmp_path / "converted"))
    assert skipped(read.backbone.space) == skipped(made.backbone.space) != []
    assert list(read.routing().excess.layers) == skipped(read.backbone.space)
    # without anything else to leave out, the cheapest networks skip it
    (layer,) = skipped(read.backbone.space)
    table = read.routing().tables["parameters"]
    smallest = read.answer(f"parameters={table.smallest_ratio + 1e-6}").sub_network
    assert read.backbone.space.widths(smallest)[2 * layer : 2 * layer + 2] == (0, 0)


def test_where_layers_are_whole_or_skipped_no_uniform_ones_are_evaluated(tmp_path):
    whole = SpaceConfig(mlp=[128], attention=[4])
    convert_model(TINY, tmp_path / "converted", prepared(), whole, CALIBRATION)
    read = load_elastic(str(tmp_path / "converted"))
    assert ways_of(read, None, ["0.9"]) == ["static"]
    with pytest.raises(ValueError, match="no sub-networks with all layers alike; what can answer budgets there: stat"):
        ways_of(read, ["uniform"], ["0.9"])
    convert_model(TINY, tmp_path / "narrower", prepared(), WIDTHS, CALIBRATION)
    assert ways_of(load_elastic(str(tmp_path / "narrower")), None, ["0.9"]) == ["static", "uniform"]


class Saved(Callback):
    """The state of the run after its second step."""

    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


class Planned(Callback):
    """Sub-networks that steps train."""

    def __init__(self):
        self.found = set()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.found.update(pl_module.plan)


def trained(*callbacks, state=None, budgets=None):
    module = ElasticTraining(TINY, space=WIDTHS, calibration=CALIBRATION, trained="compensation")
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "use_distributed_sampler": False, "limit_val_batches": 0}
    sampling = BudgetSampling(k=2, strategies={"excess": 1.0}, spread=0, budgets=budgets)
    trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=[sampling, *callbacks], **settings)
    # as `fit` does: stages ask for it while they are built
    trainer.ckpt_path = state
    trainer.fit(module, datamodule=text())
    return module


def test_a_resumed_run_leaves_out_the_same_ones(tmp_path):
    state = tmp_path / "state.ckpt"
    whole = trained(Saved(state))
    again = trained(state=state)
    assert again.backbone.space == whole.backbone.space
    assert skipped(again.backbone.space) != []
    assert again.excess == whole.excess
    pairs = zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True)
    assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)


def test_budgets_that_are_asked_for_alone_are_trained():
    planned = Planned()
    module = trained(planned, budgets=[0.9])
    (one,) = planned.found
    table = module.cost_table("parameters")
    assert 0.8 < table.ratio(one) <= 0.9
    everywhere = Planned()
    trained(everywhere)
    assert len(everywhere.found) > 1


def test_a_budget_that_nothing_meets_trains_the_smallest_network_and_is_said():
    planned = Planned()
    with pytest.warns(UserWarning, match=r"meets the budget 0\.01: the smallest parameters possible is 0\.\d+ of"):
        module = trained(planned, budgets=[0.01])
    assert planned.found == {module.backbone.space.smallest()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"skips": 1.0}, "calibration.skips is a share of the layers"),
        ({"skips": 0.2, "excess_tokens": 0}, "measured on calibration.excess_tokens"),
    ],
)
def test_a_wrong_share_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Calibration(**settings)


def test_a_share_that_is_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"0\.1 of 3 layers is none: set it to 0\.33 or more"):
        convert(ElasticBackbone(load_dense(TINY), WIDTHS), prepared(), replace(CALIBRATION, skips=0.1))


def test_what_may_be_skipped_is_not_given_twice():
    with pytest.raises(ValueError, match="leave out one of the two"):
        convert(ElasticBackbone(load_dense(TINY), SPACE), prepared(), CALIBRATION)
