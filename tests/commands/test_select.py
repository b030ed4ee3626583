import json
import shutil
from itertools import chain

import pytest
import torch

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.costs import COUNTED, Workload
from flextron_lit.costs.budget import parse_budget
from flextron_lit.latency.block_times import profile
from flextron_lit.latency.device_choice import device_of
from flextron_lit.latency.known_tables import known_tables
from flextron_lit.latency.latency_table import LatencyTable
from flextron_lit.losses.measured_loss import MeasuredLoss
from flextron_lit.routers.search import uniform_pairs
from flextron_lit.space import SubNetwork
from tests.front_door import fail, run, succeed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder of a short debug run."""
    folder = tmp_path_factory.mktemp("select") / "run"
    # without excess losses, so that what is searched is searched by measuring
    settings = ("--trainer.max_steps", 6, "--trainer.val_check_interval", 6)
    settings += ("--model.init_args.calibration.excess_tokens", 0)
    succeed("fit", "-c", "configs/debug.yaml", *settings, "--run_folder", folder)
    return folder


@pytest.fixture(scope="module")
def backbone(trained):
    return load_elastic(str(trained / "flextron")).backbone


@pytest.fixture(scope="module")
def profiled(trained, tmp_path_factory):
    """A copy with a latency table."""
    folder = shutil.copytree(trained, tmp_path_factory.mktemp("profiled") / "run")
    workload = ("--prompt_tokens", 16, "--generated_tokens", 4, "--threads", 1)
    printed = succeed("profile", "--checkpoint", folder, *workload, "--seconds", 1, "--held_out", 3)
    assert "error on held-out networks" in printed
    assert "latency-cpu-1x16+4-float32.json" in printed.replace("\n", "")
    assert "measured already" in succeed("profile", "--checkpoint", folder, *workload, "--seconds", 1)
    return folder


def test_a_dynamic_table_stands_beside_the_static_one(profiled, backbone):
    folder = profiled / "flextron"
    before = known_tables(folder, backbone, Workload(), None)
    options = ("--checkpoint", profiled, "--dynamic", "--prompt_tokens", 16, "--generated_tokens", 4, "--threads", 1)
    printed = succeed("profile", *options, "--seconds", 1, "--held_out", 2)
    for words in ("latency of a dynamic router", "routed, all at full width", "error on held-out mixtures"):
        assert words in printed
    assert "dynamic-cpu-1x16+4-float32.json" in printed.replace("\n", "")
    assert "measured already" in succeed("profile", *options, "--seconds", 1)
    assert known_tables(folder, backbone, Workload(), None) == before
    tables, latency = known_tables(folder, backbone, Workload(), None, execution="dynamic")
    assert latency.execution == "dynamic"
    assert len(latency.phases["decode"].held_out) == 2
    assert tables["latency"].reference > 0


def answer(folder, budget, *options):
    done = run("select", "--checkpoint", folder, "--budget", budget, "--tokens", 128, "--json", *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("search", ["uniform", "random", "evolution"])
def test_select_meets_the_budget_and_says_how(trained, backbone, search, tmp_path):
    output = tmp_path / "answer.json"
    found, said = answer(trained, "parameters<=0.75", "--search", search, "--count", 5, "--output", output)
    sub_network = SubNetwork.from_json(found["sub_network"])
    assert json.loads(output.read_text()) == found
    assert parse_budget("parameters<=0.75", {"parameters": COUNTED["parameters"](backbone, Workload())})[0].allows(
        sub_network
    )
    assert list(found["widths"].values()) == list(backbone.space.widths(sub_network))
    assert set(found["costs"]) == set(COUNTED)
    assert found["costs"]["parameters"]["ratio"] <= 0.75
    assert found["how"].startswith(f"{search} search, ")
    assert "validation documents of stories, reports" in found["how"]
    assert "parameters <= " in said
    assert 0 < found["loss"] < 10


def test_the_loss_is_that_of_the_run(trained):
    loaded = load_elastic(str(trained / "flextron"))
    space, table = loaded.backbone.space, COUNTED["parameters"](loaded.backbone, Workload())
    # two that are alike in all layers, of which none contains the other, and nothing within the budget contains either
    wide = [space.uniform(mlp=0.5), space.uniform(attention=0.5)]
    found, _ = answer(trained, f"parameters<={max(map(table.ratio, wide)) + 1e-4:.4f}", "--search", "uniform")
    loss = MeasuredLoss(loaded.backbone, list(chain(*loaded.held_out("validation", 128).values())))
    assert found["sub_network"] in [each.to_json() for each in wide]
    assert found["loss"] == pytest.approx(loss(SubNetwork.from_json(found["sub_network"])), rel=1e-5)
    assert found["loss"] == pytest.approx(min(map(loss, wide)), rel=1e-5)
    # on all validation tokens it is what the run says of the full network
    rows = json.loads((trained / "training.json").read_text())
    for domain, batches in loaded.held_out("validation", 512).items():
        (full,) = (r["loss"] for r in rows if (r["step"], r["sub_network"], r["domain"]) == (6, "full", domain))
        assert MeasuredLoss(loaded.backbone, batches)(loaded.backbone.space.full()) == pytest.approx(full, rel=1e-5)


def test_a_latency_budget_needs_a_profile_and_then_holds(profiled, backbone, tmp_path):
    profiled = shutil.copytree(profiled, tmp_path / "run")
    (path,) = (profiled / "flextron/costs").glob("latency-*.json")
    content = json.loads(path.read_text())
    for phase in content["phases"].values():
        # how much a tiny network saves depends on what else the machine does
        phase["table"]["blocks"] = [[float(choice) for choice in range(len(row))] for row in phase["table"]["blocks"]]
    folder = profiled / "flextron"
    checkpoint.extend(folder, folder, files={f"costs/{path.name}": json.dumps(content).encode()})
    # half-way to the fastest that is tried
    measured = known_tables(profiled / "flextron", backbone, Workload(), None)[0]["latency"]
    budget = (1 + min(measured.ratio(sub_network) for _, sub_network in uniform_pairs(backbone.space))) / 2
    found, said = answer(profiled, f"{budget:.4f}")
    assert found["costs"]["latency"]["ratio"] <= budget + 1e-4
    assert {"prefill", "decode", "latency", "parameters"} <= set(found["costs"])
    assert "measured on" in said
    smallest = fail("select", "--checkpoint", profiled, "--budget", "latency=0.000001ms")
    assert "no sub-network meets 'latency=0.000001ms': the smallest latency possible is" in smallest


def test_a_table_that_came_with_the_checkpoint_is_replaced_without_damage(trained, backbone, tmp_path):
    folder = tmp_path / "flextron"
    workload = Workload(prompt_tokens=8, generated_tokens=2, threads=1)
    old = profile(backbone, workload, budget_seconds=0.05, held_out=0)
    name = f"costs/{old.file_name}"
    checkpoint.extend(trained / "flextron", folder, files={name: json.dumps(old.to_json()).encode()})
    assert name in checkpoint.verify(folder)
    options = ("--prompt_tokens", 8, "--generated_tokens", 2, "--threads", 1, "--seconds", 0.2, "--held_out", 1)
    said = " ".join(succeed("profile", "--checkpoint", folder, *options).split())
    assert "holds" in said
    assert "fresh networks are off by" in said
    assert LatencyTable.from_json(json.loads((folder / name).read_text())) == old
    succeed("profile", "--checkpoint", folder, *options, "--fresh")
    assert name in checkpoint.verify(folder)
    assert LatencyTable.from_json(json.loads((folder / name).read_text())) != old


def test_a_budget_above_the_full_network_is_the_full_network(trained, backbone):
    found, _ = answer(trained, "90M")
    assert found["sub_network"] == backbone.space.full().to_json()
    assert found["how"].startswith("no search: the full network meets parameters <= 90.0M parameters")
    assert found["loss"] is None


def test_people_see_tables(trained, tmp_path):
    (tmp_path / "text.txt").write_text("Ada feeds the owl at the mill. " * 40)
    printed = succeed(
        "select", "--checkpoint", trained, "--budget", "flops<=0.8", "--text", tmp_path / "text.txt", "--tokens", 128
    )
    for word in ("KV groups", "neurons", "of the full network", "kv_bytes", "nats per token", "text.txt"):
        assert word in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--budget", "parameters<=0.001"), "the smallest parameters possible is"),
        (("--budget", "decode=3ms", "--latency", "none"), "no latency table 'none'; there are"),
        (("--budget", "quickly"), "cannot read the budget 'quickly'"),
        (("--budget", "0.9", "--search", "router"), "holds no router, no surrogate, no excess losses"),
        (("--budget", "0.5", "--workload", "talk"), "no workload 'talk'"),
        (("--budget", "0.5", "--device", "abacus"), "cannot use the device 'abacus'"),
        (("--budget", "flops<=0.8", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_a_mistake_is_one_clear_line(trained, options, message):
    printed = fail("select", "--checkpoint", trained, *options)
    assert message in printed
    assert "Traceback" not in printed


def test_a_table_of_another_device_is_refused_unless_it_is_named(backbone, tmp_path):
    measured = profile(backbone, Workload(prompt_tokens=8, generated_tokens=2), budget_seconds=0.05, held_out=0)
    elsewhere = {**measured.conditions, "device": {"type": "cuda", "name": "NVIDIA H100"}}
    LatencyTable(elsewhere, measured.phases).write(tmp_path)
    with pytest.raises(ValueError, match=r"(?s)device.name: 'NVIDIA H100' -> .*--latency latency-cuda"):
        known_tables(tmp_path, backbone, Workload(), None)
    assert "latency" in known_tables(tmp_path, backbone, Workload(), "latency-cuda-1x8+2-float32")[0]
    measured.write(tmp_path)
    assert known_tables(tmp_path, backbone, Workload(), None)[1] == measured


def test_a_checkpoint_whose_latencies_are_those_of_a_cpu_is_no_gpus_by_default(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(None, tmp_path).type == "cuda"
    measured = profile(backbone, Workload(prompt_tokens=8, generated_tokens=2), budget_seconds=0.05, held_out=0)
    measured.write(tmp_path)
    assert device_of(None, tmp_path).type == "cpu"
    elsewhere = {**measured.conditions, "device": {"type": "cuda", "name": "NVIDIA H100"}}
    LatencyTable(elsewhere, measured.phases).write(tmp_path)
    assert device_of(None, tmp_path).type == device_of(None).type == "cuda"


def test_several_latency_tables_want_a_choice(backbone, tmp_path):
    workloads = [Workload(prompt_tokens=n, generated_tokens=2, threads=1) for n in (8, 16)]
    assert known_tables(tmp_path, backbone, workloads[0], None)[1] is None
    measured = [profile(backbone, w, budget_seconds=0.05, held_out=0) for w in workloads]
    measured[0].write(tmp_path)
    assert known_tables(tmp_path, backbone, workloads[1], None)[1] == measured[0]
    measured[1].write(tmp_path)
    with pytest.raises(ValueError, match="several latency tables; choose one with --latency: latency-cpu-1x16"):
        known_tables(tmp_path, backbone, workloads[0], None)
    tables, chosen = known_tables(tmp_path, backbone, workloads[0], "latency-cpu-1x16+2-float32")
    assert chosen == measured[1]
    elsewhere = {**measured[0].conditions, "device": {"type": "cuda", "name": "NVIDIA H100"}}
    LatencyTable(elsewhere, measured[0].phases).write(tmp_path)
    assert known_tables(tmp_path, backbone, workloads[0], "latency-cuda-1x8+2-float32")[1].conditions == elsewhere
    # what is counted is counted for the workload that was measured
    assert tables["kv_bytes"] == COUNTED["kv_bytes"](backbone, workloads[1])
    assert torch.equal(tables["latency"].expected(torch.zeros(6, 4)), torch.tensor(tables["latency"].fixed))
