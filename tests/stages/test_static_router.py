"""The router stage in process: the gate, the guide, the two optimizers."""

import dataclasses

import pytest
import torch
from lightning.pytorch import Callback

from flextron_lit import callbacks, checkpoint
from flextron_lit.routers.surrogate import Surrogate
from flextron_lit.routers.trained import SURROGATE, TrainedSurrogate
from flextron_lit.stages import StaticRouterTraining, SurrogateTraining
from tests.front_door import succeed
from tests.options import seed
from tests.stages.routers import Watch, fit, moved


@pytest.fixture(scope="module")
def elastic(tmp_path_factory):
    """The checkpoint of an elastic run that is long enough for widths to matter."""
    folder = tmp_path_factory.mktemp("elastic") / "run"
    settings = ("--trainer.max_steps", 200, "--trainer.val_check_interval", 200)
    succeed("fit", "-c", "configs/debug.yaml", *settings, "--run_folder", folder)
    return folder / "flextron"


@pytest.fixture(scope="module")
def surrogate(elastic, tmp_path_factory):
    """A checkpoint with a surrogate."""
    folder = tmp_path_factory.mktemp("surrogate")
    stage = SurrogateTraining(str(elastic), pairs=128, held_out=8, tokens=512, block_size=64, batch_size=16)
    fit(stage, folder, max_epochs=40)
    checkpoint.extend(elastic, folder / "flextron", files=stage.files())
    return folder / "flextron"


@pytest.fixture(scope="module")
def bad(surrogate, tmp_path_factory):
    """The same with a surrogate that is far off everywhere, and makes other differences than there are."""
    folder = tmp_path_factory.mktemp("bad") / "flextron"
    space = checkpoint.read(surrogate).space
    trained = TrainedSurrogate.read(surrogate, space)
    network = Surrogate(space, 64, torch.Generator().manual_seed(seed(1)))
    with torch.no_grad():
        # ten standard deviations: more than a surrogate can learn in a few steps
        network.centre.copy_(trained.network.centre + 10 * trained.network.scale)
        network.scale.copy_(trained.network.scale)
        network.main.weight.normal_(generator=torch.Generator().manual_seed(seed(2)))
    checkpoint.extend(surrogate, folder, files={SURROGATE: dataclasses.replace(trained, network=network).to_bytes()})
    return folder


@pytest.fixture
def truth(surrogate, monkeypatch):
    """Losses are what the surrogate says, so that it is right, and what differs from it is wrong."""
    trained = TrainedSurrogate.read(surrogate, checkpoint.read(surrogate).space)

    def losses_of(stage, sub_networks, description=None):
        one_hot = torch.stack([stage.backbone.space.one_hot(each) for each in sub_networks])
        return trained.to_nats(trained.predict(one_hot)).tolist()

    monkeypatch.setattr(StaticRouterTraining, "losses_of", losses_of)
    return trained


class Mended(Callback):
    """A surrogate that is right from one step on."""

    def __init__(self, network, step):
        self.state, self.step = network.state_dict(), step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            pl_module.surrogate.load_state_dict(self.state)


def guided(folder, tmp_path, *before, steps=40, **guidance):
    watch = Watch()
    stage = StaticRouterTraining(str(folder), cost="parameters", hidden=16, seed=seed(0))
    guide = callbacks.SurrogateGuidance(**({"every_n_steps": 5, "pairs": 8, "window": 16} | guidance))
    trainer = fit(stage, tmp_path, callbacks.BudgetSampling(k=8), *before, guide, watch, max_steps=steps)
    assert trainer.global_step == steps
    return stage, watch


def test_with_a_bad_surrogate_the_router_stands_still_until_it_is_good(bad, truth, tmp_path):
    stage, watch = guided(bad, tmp_path, Mended(truth.network, 20), steps=40)
    first = watch.open.index(True)
    # two looks fill the window with what it predicts since
    assert first == 25
    assert moved(watch.router)[: first - 1] == [False] * (first - 1)
    assert stage.moves == sum(watch.open)
    # each step of the router follows the gate, each step of the surrogate does not
    assert moved(watch.router) == watch.open[1:]
    assert all(moved(watch.surrogate))
    assert any(watch.open[first:])


def test_a_sub_network_of_the_frozen_backbone_is_validated_once_on_the_same_tokens(surrogate, tmp_path):
    stage = StaticRouterTraining(str(surrogate), cost="parameters", hidden=16, budgets=[0.8])
    ran = []
    once = callbacks.SurrogateGuidance(every_n_steps=99, pairs=8)
    fit(stage, tmp_path, callbacks.BudgetSampling(k=8), once, max_steps=2)
    stage.backbone.model.register_forward_hook(lambda *_: ran.append(1))
    full = stage.backbone.space.full()
    batch = {"input_ids": torch.arange(16)[None], "labels": torch.arange(16)[None]}
    batch["position_ids"] = batch["input_ids"]
    others = [(full, batch | {"labels": batch["labels"].flip(1)}), (stage.backbone.space.smallest(), batch)]
    first, again, *different = [stage.measured(*each) for each in [(full, batch), (full, dict(batch)), *others]]
    assert first == again
    assert first not in different
    assert len(ran) == 3


def test_without_a_threshold_the_router_would_have_moved_at_once(bad, tmp_path):
    _, watch = guided(bad, tmp_path, steps=6, threshold=1e9)
    assert watch.open == [True] * 6
    assert all(moved(watch.router))


def test_a_good_surrogate_opens_the_gate_at_once_and_learns_from_the_routers_own_choices(surrogate, truth, tmp_path):
    stage, watch = guided(surrogate, tmp_path)
    assert watch.open[0]
    before = TrainedSurrogate.read(surrogate, stage.backbone.space).pairs
    # half a window first, then 8 at every fifth step but the first
    assert len(stage.pairs) == len(before) + 8 + 7 * 8
    assert torch.equal(stage.pairs.choices[: len(before)], before.choices)


def test_the_guides_loss_reaches_the_router_and_not_the_surrogate(surrogate, tmp_path):
    stage, _ = guided(surrogate, tmp_path, steps=1)
    routed = stage.route(torch.tensor([0.4, 0.8]), torch.Generator().manual_seed(seed(0)))
    stage.zero_grad()
    stage.predicted(routed).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.router.parameters())
    assert all(p.grad is None for p in stage.surrogate.parameters())


def planted(surrogate, folder, monkeypatch, wants):
    """A checkpoint whose surrogate, pairs and text agree that a choice of a kind is worth so much a step up."""
    trained = TrainedSurrogate.read(surrogate, checkpoint.read(surrogate).space)
    space = checkpoint.read(surrogate).space
    network = Surrogate(space, 64, torch.Generator().manual_seed(seed(0)))
    worth = torch.tensor([wants[block.kind] for block in space.blocks])
    with torch.no_grad():
        network.main.weight.copy_(-(torch.arange(space.num_choices) * worth[:, None]).flatten()[None])

    def losses_of(stage, sub_networks, description=None):
        return (-(torch.tensor([each.choices for each in sub_networks]) * worth).sum(-1)).tolist()

    monkeypatch.setattr(StaticRouterTraining, "losses_of", losses_of)
    pairs = dataclasses.replace(trained.pairs, losses=-(trained.pairs.choices * worth).sum(-1))
    made = dataclasses.replace(trained, network=network, target="loss", pairs=pairs)
    checkpoint.extend(surrogate, folder, files={SURROGATE: made.to_bytes()})
    return folder


def test_training_brings_the_answers_to_their_budgets_and_lowers_their_loss(surrogate, tmp_path, monkeypatch):
    budgets = torch.linspace(0.3, 0.95, 12)

    def answered(name, **wants):
        folder = planted(surrogate, tmp_path / name, monkeypatch, wants)
        stage, _ = guided(folder, tmp_path, steps=200, pairs=1, threshold=1e9)
        return stage, stage.router(budgets).argmax(-1)

    # attention is all that matters: a step of it is worth more than what it costs, and all of it fits half of the cost
    stage, choices = answered("attention", attention=1.0, mlp=0.0)
    attention = torch.tensor([block.kind == "attention" for block in stage.backbone.space.blocks])
    widest = torch.tensor(stage.backbone.space.full().choices)
    assert (choices[budgets > 0.5][:, attention] == widest[attention]).all()
    # everything is worth less than what it costs beyond the budget, which the full network exceeds by 0.375
    stage, choices = answered("everything", attention=0.25, mlp=0.25)
    one_hot = torch.nn.functional.one_hot(choices, stage.backbone.space.num_choices).float()
    exceeded = (stage.table.expected(one_hot) / stage.table.full - budgets).clamp(min=0)
    assert exceeded.mean() < 0.375 / 3


def test_through_the_backbone_the_text_guides(surrogate, tmp_path):
    watch = Watch()
    stage = StaticRouterTraining(str(surrogate), cost="parameters", hidden=16, through_backbone=True)
    trainer = fit(stage, tmp_path, callbacks.BudgetSampling(k=2), watch, max_steps=4)
    assert trainer.global_step == 4
    assert all(moved(watch.router))
    assert not any(moved(watch.surrogate))
    assert stage.tokens_seen == 4 * 64
    assert all(p.grad is None for p in stage.backbone.model.parameters())


@pytest.mark.parametrize(
    ("settings", "extra", "message"),
    [
        ({}, [callbacks.BudgetSampling(k=2)], "nothing guides the router"),
        ({}, [callbacks.SurrogateGuidance()], "no budgets to train for"),
        (
            {"through_backbone": True},
            [callbacks.BudgetSampling(), callbacks.SurrogateGuidance()],
            "take callbacks.SurrogateGuidance out",
        ),
        ({}, [callbacks.BudgetSampling(cost="flops"), callbacks.SurrogateGuidance()], "leave them out"),
        ({"cost": "latency"}, [callbacks.BudgetSampling(), callbacks.SurrogateGuidance()], "no cost 'latency'"),
        (
            {"budgets": [0.01]},
            [callbacks.BudgetSampling(), callbacks.SurrogateGuidance()],
            "no sub-network meets the budget 0.01",
        ),
        ({}, [callbacks.BudgetSampling(), callbacks.FlextronCheckpointWriter(keep="best")], "set it to last"),
    ],
)
def test_what_does_not_fit_together_is_one_clear_error(surrogate, tmp_path, settings, extra, message):
    stage = StaticRouterTraining(str(surrogate), **({"cost": "parameters", "hidden": 16} | settings))
    with pytest.raises(ValueError, match=message):
        fit(stage, tmp_path, *extra, max_steps=2, limit_val_batches=1)


def test_the_loss_itself_can_be_the_target(elastic, tmp_path, monkeypatch):
    def losses_of(stage, sub_networks, description=None):
        """A sum of what every choice adds, as the surrogate starts from: what it learns on leaves it nearly right."""
        return [4.0 - 0.1 * sum(each.choices) for each in sub_networks]

    monkeypatch.setattr(SurrogateTraining, "losses_of", losses_of)
    monkeypatch.setattr(StaticRouterTraining, "losses_of", losses_of)
    stage = SurrogateTraining(
        str(elastic), target="loss", pairs=128, held_out=8, tokens=512, block_size=64, batch_size=16
    )
    fit(stage, tmp_path, max_epochs=10)
    pairs, predicted = stage.held_out()
    assert (predicted - pairs.losses).abs().mean() < 0.2 * pairs.losses.std()
    checkpoint.extend(elastic, tmp_path / "flextron", files=stage.files())
    router = StaticRouterTraining(str(tmp_path / "flextron"), cost="parameters", hidden=16)
    guide = callbacks.SurrogateGuidance(threshold=1e9)
    fit(router, tmp_path, callbacks.BudgetSampling(k=4), guide, max_steps=2)
    assert router.trained.target == "loss"
    assert torch.equal(router.trained.targets(pairs.losses), pairs.losses)
    assert router.ladder.rungs[-1].sub_network == router.backbone.space.full()


def test_stages_start_where_the_one_before_ended(elastic, tmp_path):
    with pytest.raises(ValueError, match=r"holds no elastic/surrogate.safetensors: run the surrogate stage first"):
        fit(StaticRouterTraining(str(elastic)), tmp_path, max_steps=1)
    with pytest.raises(ValueError, match="is no Flextron checkpoint"):
        fit(SurrogateTraining("random:configs/models/tiny-llama"), tmp_path, max_epochs=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StaticRouterTraining("x", budgets=[0.5, 1.5]), "above 0 and at most 1, not 1.5"),
        (lambda: StaticRouterTraining("x", hidden=0), "must be 1 or more"),
        (lambda: SurrogateTraining("x", pairs=3), "at least one batch of pairs"),
        (lambda: SurrogateTraining("x", target="perplexity"), "target is one of log_excess, loss"),
        (lambda: SurrogateTraining("x", tokens=0), "must be 1 or more"),
        (lambda: callbacks.SurrogateGuidance(pairs=0), "a closed gate stays closed"),
    ],
)
def test_a_number_out_of_range_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
