"""The ladder's benchmark spends on elastic training what it says, and its networks are of as many parameters."""

import importlib

import pytest

from flextron_lit.costs import parameter_table
from flextron_lit.elastic import ElasticBackbone
from tests.front_door import ROOT


@pytest.fixture
def ladder(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ladder")


@pytest.mark.parametrize("passes", [3, 4])
def test_elastic_training_spends_no_more_than_its_share(ladder, passes):
    recipe, wanted = ladder.Recipe(), 100_000.5
    step = passes * recipe.elastic_batch_size * ladder.BLOCK_SIZE
    spent = ladder.CALIBRATION.tokens + ladder.CALIBRATION.excess_tokens
    spent += recipe.elastic_steps(wanted, passes) * step
    assert spent <= wanted < spent + step


def test_a_share_that_conversion_alone_uses_up_is_refused(ladder):
    with pytest.raises(ValueError, match="conversion alone reads"):
        ladder.Recipe().elastic_steps(ladder.CALIBRATION.tokens, 3)


def test_rungs_are_of_the_sizes_of_the_sub_networks_beside_them(ladder):
    backbone = ElasticBackbone(ladder.untrained(0))
    table = parameter_table(backbone)
    alike = [table.cost(backbone.space.uniform(size, size)) for size in ladder.SIZES]
    assert alike == [ladder.untrained(0, size).num_parameters() for size in ladder.SIZES]
    assert alike == sorted(set(alike))
