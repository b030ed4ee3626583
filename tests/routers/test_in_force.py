from dataclasses import replace

import pytest

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.routers.in_force import in_force
from tests import served


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return load_elastic(str(served.write(tmp_path_factory.mktemp("scratch") / "flextron", routers=()))).backbone


def router(backbone, tokens, name="latency"):
    return replace(served.static_router(backbone), table=served.latency_table(backbone, tokens).tables()[name])


def names(routers):
    return {each.name for each in routers}


def test_a_router_for_a_table_that_is_gone_makes_way_for_one_whose_table_is_there(backbone, tmp_path):
    old, new, flops = router(backbone, 16), router(backbone, 32), served.static_router(backbone)
    served.latency_table(backbone, 32).write(tmp_path)
    assert names(in_force([old, new, flops], tmp_path, backbone.space)) == names([new, flops])
    # the control: with both tables there, as of two devices, both are in force
    served.latency_table(backbone, 16).write(tmp_path)
    assert names(in_force([old, new, flops], tmp_path, backbone.space)) == names([old, new, flops])


def test_where_no_table_is_there_every_router_is_all_that_there_is(backbone, tmp_path):
    old = router(backbone, 16)
    assert names(in_force([old], tmp_path, backbone.space)) == names([old])
    served.latency_table(backbone, 32).write(tmp_path)
    # another latency puts nothing aside
    prefill = router(backbone, 32, "prefill")
    assert names(in_force([old, prefill], tmp_path, backbone.space)) == names([old, prefill])
