"""Two processes train what one would with all of a batch: by every strategy, in every stage."""

import pytest
import torch

from flextron_lit.checkpoint import weight_files
from flextron_lit.checkpoint.in_memory import load_elastic
from tests import ranks
from tests.runs import equal
from tests.stages import together

CLOSE = 1e-5
"""Losses are added up in float32, and in another order."""
FAR = 1e-3
"""What steps on other gradients differ by at least."""
JOBS = [("fsdp2", "elastic"), ("fsdp2", "static"), ("fsdp2", "both_routers"), ("ddp", "both_routers")]
JOBS += [("ddp_find_unused_parameters_true", "elastic")]
"""Together they come by everything that processes do together."""
LONG = [(strategy, name) for strategy in ("ddp", "fsdp2") for name in together.STAGES if (strategy, name) not in JOBS]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint with own projections, a surrogate and both kinds of router, all of them barely trained."""
    return together.prepared(together.dense("llama", None), tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """What one process ends with, made once for each stage."""
    made = {}

    def found(name):
        if name not in made:
            made[name] = together.trained(getattr(together, name), start, tmp_path_factory.mktemp(name))
        return made[name]

    return found


def ended(folder, name):
    return [torch.load(folder / f"{name}-rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def two(start, tmp_path_factory):
    """The folder in which two processes have left what they ended with."""
    folder = tmp_path_factory.mktemp("two")
    ranks.together(together.compare_and_go_wrong, folder, start, JOBS)
    return folder


def farthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def check_same(wanted, found):
    assert found["error"] is None
    assert found["plans"] == wanted["plans"]
    assert found["measured"] == wanted["measured"]
    # every weight, own projections of narrower widths among them
    assert farthest(found["weights"], wanted["weights"]) < CLOSE
    assert len(found["losses"]) == len(wanted["losses"])
    for ours, theirs in zip(found["losses"], wanted["losses"], strict=True):
        assert torch.allclose(ours, theirs, atol=CLOSE, rtol=0)


@pytest.mark.parametrize(("strategy", "name"), JOBS)
def test_two_processes_end_as_one(two, alone, strategy, name):
    first, second = ended(two, f"{strategy}-{name}")
    check_same(alone(name), first)
    assert equal(first["weights"], second["weights"])
    assert farthest(first["weights"], first["before"]) > 0


@pytest.mark.slow
def test_every_stage_by_every_strategy(start, alone, tmp_path):
    """Over 50 steps, of two families, and by two machines: `benchmarks/ranks_equal.py`."""
    ranks.together(together.compare, tmp_path, start, LONG)
    for strategy, name in LONG:
        check_same(alone(name), ended(tmp_path, f"{strategy}-{name}")[0])


def test_who_trains_alone_is_stopped_at_the_first_update(two, alone):
    for rank in ended(two, "alone"):
        assert rank["error"].startswith("gradients differ between processes")
        assert farthest(rank["weights"], rank["before"]) == 0
    # the control: nobody would notice
    first, second = ended(two, "unnoticed")
    assert first["error"] is None
    assert farthest(first["weights"], second["weights"]) > FAR
    assert farthest(first["weights"], alone("elastic")["weights"]) > FAR


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_loss_that_is_no_number_on_one_process_stops_all_before_the_update(two, strategy):
    found = ended(two, f"{strategy}-lost")
    for rank in found:
        assert rank["error"].startswith("stopped before the update of step 2: the loss of")
        assert "is nan on process 1 of 2" in rank["error"]
        assert len(rank["plans"]) == 1
        assert farthest(rank["weights"], rank["before"]) == 0
    assert equal(found[0]["weights"], found[1]["weights"])


def test_each_process_holds_its_part(two, alone):
    first, second = ended(two, "fsdp2-elastic")
    everything = alone("elastic")["held"]
    assert first["held"] + second["held"] == everything
    assert abs(first["held"] / everything - 0.5) < 0.1
    # the control: by ddp each holds all
    assert ended(two, "ddp-both_routers")[0]["held"] == everything


def test_lightnings_own_strategy_shares_out_too(two):
    first, second = ended(two, "lightning")
    assert first["error"] is None
    assert first["held"] == pytest.approx(second["held"], rel=0.1)
    assert equal(first["weights"], second["weights"])
    # of float32: half of what the others hold
    assert first["held"] == ended(two, "fsdp2-elastic")[0]["held"] / 2


def test_one_process_measures_latencies_for_all(two):
    first, second = ended(two, "measured")
    assert (first["measured"], second["measured"]) == (1, 0)
    assert first["latency"] == second["latency"]
    assert first["latency"] is not None
    assert first["plans"] == second["plans"]
    assert equal(first["weights"], second["weights"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_that_of_the_layers(two, precision):
    first, second = ended(two, f"fsdp2-{precision}")
    assert first["error"] is None
    kept = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16}[precision]
    assert {each.dtype for each in first["weights"].values()} == {kept}
    assert equal(first["weights"], second["weights"])
    assert all(each.isfinite().all() for each in first["weights"].values())


def test_the_folder_holds_the_whole_network(two, alone):
    folder = two / "fsdp2" / "elastic" / "flextron"
    assert [path.name for path in weight_files(folder)] == ["model.safetensors"]
    found = load_elastic(str(folder)).backbone
    wanted = ended(two, "fsdp2-elastic")[0]["weights"]
    assert all(
        torch.allclose(p.double(), wanted[f"model.{name}"].double(), atol=CLOSE)
        for name, p in found.model.named_parameters()
    )
