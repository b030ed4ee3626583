import json

import pytest
import torch

from flextron_lit.routers.budget_prices import Priced, Prices
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter
from flextron_lit.space import SpaceConfig, resolve
from tests.routers.test_dynamic import SPACE, TABLE, choices, hidden, random_router

PRICES = Prices((Priced(0.3, 0.5, 0.3, 4.0), Priced(0.9, -0.25, 0.9, 3.0)))


def trained():
    return TrainedDynamicRouter(random_router(), TABLE, PRICES, settings={"guidance": "token", "steps": 3})


def written(folder, router=None):
    """The JSON file of a router in a checkpoint."""
    files = (router or trained()).files()
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return next((folder / "routers").glob("*.json"))


def test_what_is_stored_comes_back(tmp_path):
    router = trained()
    path = written(tmp_path, router)
    assert path.stem == router.name == f"dynamic-units-{TABLE.sha256[:8]}"
    (again,) = TrainedDynamicRouter.read_all(tmp_path, SPACE)
    assert (again.table, again.prices, again.settings) == (TABLE, PRICES, router.settings)
    for name, tensor in router.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], tensor), name
    one, other = (choices(each.policy([0.4]), hidden()) for each in (router, again))
    assert torch.equal(one, other)
    assert again.files() == router.files()


def test_a_static_router_beside_it_is_another(tmp_path):
    written(tmp_path)
    assert TrainedRouter.read_all(tmp_path, SPACE) == []
    assert len(TrainedDynamicRouter.read_all(tmp_path, SPACE)) == 1
    assert TrainedDynamicRouter.read_all(tmp_path / "elsewhere", SPACE) == []


def test_its_policy_has_the_price_of_its_budget():
    router = trained()
    between = choices(router.policy([0.6]), hidden())
    assert not torch.equal(between, choices(router.policy([0.3]), hidden()))
    both = router.policy([0.3, 0.6])
    assert torch.equal(choices(both, hidden(batch=2))[1], choices(router.policy([0.6]), hidden(batch=2))[1])
    with pytest.raises(ValueError, match=r"budgets of 0.300 and more, not 0.2"):
        router.policy([0.6, 0.2])


def test_it_is_stale_since_the_first_stage_that_changed_the_network(tmp_path):
    assert trained().stale is None
    marked = trained().stale_since("JointTuning").stale_since("ElasticTraining")
    assert marked.stale == "JointTuning"
    written(tmp_path, marked)
    (again,) = TrainedDynamicRouter.read_all(tmp_path, SPACE)
    assert again.stale == "JointTuning"


def other_table(path):
    about = json.loads(path.read_text())
    about["table"]["fixed"] += 1
    path.write_text(json.dumps(about))


def without_prices(path):
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "prices"}))


DAMAGE = {
    "another cost table": (other_table, "not the one that it was trained on"),
    "no prices": (without_prices, "prices"),
    "half a file": (lambda path: path.write_text(path.read_text()[:40]), "train the router again"),
    "half the weights": (
        lambda path: path.with_suffix(".safetensors").write_bytes(b"nothing"),
        "train the router again",
    ),
    "no weights": (lambda path: path.with_suffix(".safetensors").unlink(), "train the router again"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(damage, tmp_path):
    spoil, message = DAMAGE[damage]
    path = written(tmp_path)
    TrainedDynamicRouter.read(path, SPACE)
    spoil(path)
    with pytest.raises(ValueError, match=message) as error:
        TrainedDynamicRouter.read_all(tmp_path, SPACE)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (SpaceConfig(mlp=[0, 16, 32, 64], attention=[0, 1, 2, 4]), 3),
        (SpaceConfig(mlp=[0, 32, 64], attention=[0, 1, 2, 4]), 2),
    ],
)
def test_a_router_of_another_space_is_refused(config, layers, tmp_path):
    path = written(tmp_path)
    space = resolve(config, num_layers=layers, neurons=64, kv_groups=4)
    with pytest.raises(ValueError, match="is damaged, or of another space"):
        TrainedDynamicRouter.read(path, space)
