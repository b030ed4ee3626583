import shutil
from dataclasses import replace
from functools import partial

import pytest

from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.report import findings
from flextron_lit.report.reported_folder import Source
from flextron_lit.routers.in_force import in_force
from flextron_lit.routers.trained import TrainedRouter
from flextron_lit.stages.tuned_router import tuned_routers
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


def test_tuning_and_the_report_take_what_was_measured_last(backbone, tmp_path):
    def routers_for(*tokens):
        return [partial(served.latency_router, prompt_tokens=each) for each in tokens]

    folder = served.write(tmp_path / "flextron", routers=routers_for(16, 32))
    space = backbone.space
    both = sorted(router.table.sha256 for router in TrainedRouter.read_all(folder, space))
    with pytest.raises(ValueError, match="holds several static routers; set cost to one of latency-.*, latency-"):
        tuned_routers("static", None, folder, space)
    for tokens in (16, 32):
        served.latency_table(backbone, tokens).write(folder)
        own = served.latency_table(backbone, tokens).tables()["latency"].sha256
        (tuned,) = tuned_routers("static", "latency", folder, space)
        assert tuned.table.sha256 == own
        shown = findings.gather(Source(folder, folder), backbone)
        assert shown.static.table.sha256 == own
        assert "whose latency table is no longer there" in shown.notes[0]
        # the other is there still, for who names it
        (other,) = {*both} - {own}
        (named,) = tuned_routers("static", f"latency-{other[:8]}", folder, space)
        assert named.table.sha256 == other
        shutil.rmtree(folder / "costs")
