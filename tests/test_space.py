import pytest
import torch

from flextron_lit.space import Block, ElasticSpace, LayerWidths, SpaceConfig, SubNetwork, resolve
from tests.options import seed

FULL = {"num_layers": 3, "neurons": 64, "kv_groups": 4}


def space(**settings):
    return resolve(SpaceConfig(**settings), **FULL)


def test_defaults_are_quarters_of_the_mlp_and_every_group():
    blocks = space().blocks
    assert [b.name for b in blocks[:2]] == ["layers.0.attention", "layers.0.mlp"]
    assert {b.widths for b in blocks if b.kind == "mlp"} == {(16, 32, 48, 64)}
    assert {b.widths for b in blocks if b.kind == "attention"} == {(1, 2, 3, 4)}


def test_ratios_and_integers_mean_the_same():
    assert space(mlp=[0.25, 0.5, 1.0], attention=[0.5, 1.0]) == space(mlp=[16, 32, 64], attention=[2, 4])


@pytest.mark.parametrize(
    ("ratio", "full", "units"), [(0.55, 100, 55), (0.29, 100, 29), (0.07, 100, 7), (1 / 3, 3, 1), (0.33333333, 12, 4)]
)
def test_a_ratio_may_miss_a_whole_number_by_rounding(ratio, full, units):
    found = resolve(SpaceConfig(mlp=[ratio, 1.0], attention=[4]), num_layers=1, neurons=full, kv_groups=4)
    assert found.blocks[1].widths == (units, full)
    assert found.widths(found.uniform(mlp=ratio)) == (4, units)
    per_layer = SpaceConfig(layers={0: LayerWidths(attention=[ratio, 1.0])})
    assert resolve(per_layer, num_layers=1, neurons=64, kv_groups=full).blocks[0].widths == (units, full)


def test_a_common_zero_skips_everywhere_but_in_the_first_attention():
    attention = [b.widths for b in space(attention=[0, 2, 4]).blocks if b.kind == "attention"]
    assert attention == [(2, 4), (0, 2, 4), (0, 2, 4)]


def test_layers_can_differ():
    blocks = space(layers={1: LayerWidths(mlp=[8, 64])}).blocks
    assert [b.widths for b in blocks if b.kind == "mlp"] == [(16, 32, 48, 64), (8, 64), (16, 32, 48, 64)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp": [32, 16, 64]}, r"must ascend, but are \[32, 16, 64\]"),
        ({"mlp": [16, 16, 64]}, "must ascend"),
        ({"mlp": [16, 32]}, r"must be the full one, 64 \(or 1.0\), but is 32"),
        ({"mlp": [0.3, 1.0]}, "19.2 of 64 units, not a whole number"),
        ({"attention": [0.3, 1.0]}, "1.2 of 4 units, not a whole number"),
        ({"mlp": [-1, 64]}, "outside 0 to 64"),
        ({"mlp": [16, 128]}, "outside 0 to 64"),
        ({"mlp": [0.25001, 1.0]}, "16.0006 of 64 units, not a whole number"),
        ({"mlp": [float("nan"), 1.0]}, "width nan of layers.0.mlp is nan units, outside 0 to 64"),
        ({"mlp": [float("inf")]}, "width inf of layers.0.mlp is inf units, outside 0 to 64"),
        ({"mlp": []}, "must ascend"),
        ({"layers": {7: LayerWidths(mlp=[64])}}, "layer 7, but the model has layers 0 to 2"),
        ({"layers": {0: LayerWidths(attention=[0, 4])}}, "layers.0.attention cannot have width 0"),
    ],
)
def test_a_wrong_space_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        space(**settings)


def test_named_sub_networks():
    s = space()
    assert s.widths(s.full()) == (4, 64) * 3
    assert s.widths(s.smallest()) == (1, 16) * 3
    assert s.widths(s.uniform(mlp=0.6, attention=0.5)) == (2, 32) * 3
    with pytest.raises(ValueError, match=r"no width at or below 0.1 of 64; its smallest is 16"):
        s.uniform(mlp=0.1)
    with pytest.raises(ValueError, match="lies in 0 to 1, but is 1.5"):
        s.uniform(mlp=1.5)


def test_random_draws_reach_every_choice_and_repeat_with_the_seed(generator):
    s = space()
    drawn = [s.random(generator) for _ in range(200)]
    assert [{d.choices[i] for d in drawn} for i in range(6)] == [{0, 1, 2, 3}] * 6
    again = torch.Generator().manual_seed(seed(3))
    assert [s.random(again) for _ in range(200)] == drawn
    assert s.random(generator) != drawn[0]


def test_uniform_draws_are_alike_in_every_layer(generator):
    s = space()
    drawn = [s.random_uniform(generator).choices for _ in range(50)]
    assert all(d[0:2] == d[2:4] == d[4:6] for d in drawn)
    assert len(set(drawn)) > 8
    assert not all(c[0:2] == c[2:4] for c in (s.random(generator).choices for _ in range(50)))


def test_one_hot():
    s = resolve(SpaceConfig(mlp=[32, 64], attention=[1, 2, 4]), **FULL)
    encoded = s.one_hot(SubNetwork((0, 1) * 3))
    assert encoded.shape == (6, 3)
    assert encoded[0].tolist() == [1, 0, 0]
    assert encoded[1].tolist() == [0, 1, 0]


def test_sub_networks_are_values():
    sub_network = SubNetwork((0, 1, 2))
    assert sub_network == SubNetwork.from_json(sub_network.to_json())
    assert len({sub_network, SubNetwork((0, 1, 2)), sub_network.replace(1, 0)}) == 2
    with pytest.raises(AttributeError):
        sub_network.choices = (1,)


def test_the_space_survives_json_and_is_checked_again():
    s = space(attention=[0, 1, 4])
    rows = s.to_json()
    assert ElasticSpace.from_json(rows) == s
    rows[1]["widths"] = [32, 16, 64]
    with pytest.raises(ValueError, match="must ascend"):
        ElasticSpace.from_json(rows)


@pytest.mark.parametrize(
    ("choices", "message"),
    [((0, 0), "2 choices, the space 6 blocks"), ((0, 0, 0, 9, 0, 0), "choice 9 of layers.1.mlp")],
)
def test_a_sub_network_of_another_space_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        space().check(SubNetwork(choices))


def test_block_names_and_counts():
    assert Block(4, "mlp", (8, 16)).name == "layers.4.mlp"
    assert space(mlp=[32, 64], attention=[4]).num_sub_networks == 8
