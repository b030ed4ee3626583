"""The profiler on a machine whose times are known: a clock that counts work instead of seconds."""

import json
import math

import pytest
import torch

from flextron_lit.costs.workload import WORKLOADS, Workload, named
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.latency import block_times as profiler
from flextron_lit.latency.block_times import Passes, probes, profile, table_of
from flextron_lit.latency.latency_table import LatencyTable, conditions, read_all
from flextron_lit.space import SpaceConfig, SubNetwork
from tests.conftest import MODELS, SPACE, make_gpt2, make_llama
from tests.latency.known_machine import put_in_place
from tests.options import seed

WORKLOAD = Workload(batch_size=2, prompt_tokens=12, generated_tokens=5, threads=1)


@pytest.fixture
def backbone():
    return ElasticBackbone(make_llama(), SPACE)


@pytest.fixture
def machine(monkeypatch):
    """Times that follow from the widths that ran: neurons cost 1 each, KV groups 8, the rest 50; noise on request."""
    state = {"noise": 0.0, "passes": 0, "generator": torch.Generator().manual_seed(seed(0))}

    def run(self, ids, cache):
        noise = torch.randn((), generator=state["generator"]).item() * state["noise"]
        state["passes"] += 1
        state["last"] = truth(self.backbone, self.selection) * ids.shape[1] * (1 + noise) / 1e3

    return put_in_place(monkeypatch, run, state)


def truth(backbone, sub_network):
    widths = backbone.space.widths(sub_network)
    return 50 + sum(w * (8 if b.kind == "attention" else 1) for b, w in zip(backbone.space.blocks, widths, strict=True))


def test_the_table_gives_the_times_of_every_sub_network(backbone, machine, generator):
    found = profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=6)
    full = truth(backbone, backbone.space.full())
    for phase, tokens in (("prefill", 12), ("decode", 1)):
        table = found.phases[phase].table
        assert table.full == pytest.approx(full * tokens)
        for _ in range(30):
            sub_network = backbone.space.random(generator)
            assert table.cost(sub_network) == pytest.approx(truth(backbone, sub_network) * tokens)
        assert found.phases[phase].error == pytest.approx(0, abs=1e-9)
        assert len(found.phases[phase].held_out) == 6
        assert found.phases[phase].spread == 0
    request = found.tables()["latency"]
    assert request.full == pytest.approx(full * (12 + 4))
    assert min(min(row) for row in request.blocks) >= -1e-9


def test_two_profiles_agree_within_their_spread(backbone, machine):
    machine["noise"] = 0.02
    # time for as many rounds as there may be, however busy the machine: medians of 100 are far closer than the spread
    one, other = (profile(backbone, WORKLOAD, budget_seconds=1e6, held_out=0) for _ in range(2))
    for phase in ("prefill", "decode"):
        mine, yours = one.phases[phase], other.phases[phase]
        assert mine.spread > 0
        apart = [abs(mine.table.ratio(sub) - yours.table.ratio(sub)) for sub in probes(backbone.space).values()]
        assert 0 < max(apart) < mine.spread + yours.spread


def test_equal_blocks_are_measured_together(backbone):
    found = probes(backbone.space)
    assert set(found) == {("attention", w) for w in (0, 1, 2)} | {("mlp", w) for w in (0, 16, 32)}
    assert found["mlp", 16] == SubNetwork((2, 1, 3, 1, 3, 1))
    # the attention of the first layer cannot be skipped, and is measured with its like at every other width
    assert found["attention", 0] == SubNetwork((2, 3, 0, 3, 0, 3))
    assert found["attention", 1] == SubNetwork((0, 3, 1, 3, 1, 3))


def test_held_out_sub_networks_differ_by_layer_and_spread_over_cost(machine):
    backbone = ElasticBackbone(make_llama(num_hidden_layers=12), SpaceConfig(mlp=[16, 32, 64]))
    rows = profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=20).phases["prefill"].held_out
    measured = [row.measured for row in rows]
    assert len(set(rows)) == 20
    low = truth(backbone, backbone.space.smallest()) / truth(backbone, backbone.space.full())
    step = (1 - low) / 20
    assert all(abs(m - (low + (i + 0.5) * step)) < 0.02 for i, m in enumerate(measured))
    assert all(len(set(row.choices[1::2])) > 1 for row in rows[2:-2])


def test_no_noise_makes_a_cost_negative(backbone):
    space = backbone.space
    shares = {"attention": 0.05, "mlp": 0.1}
    saved = {("attention", 0): 0.02, ("mlp", 0): 0.08, ("mlp", 16): -0.01}
    calm = table_of(space, "prefill", 100.0, saved, shares)
    assert calm.fixed == pytest.approx(100 - 3 * 5 - 3 * 10)
    assert calm.blocks[2] == pytest.approx((3, 5, 5, 5))
    assert calm.blocks[1] == pytest.approx((2, 11, 10, 10))
    # a split that leaves nothing for the rest: sums stay as they are
    split = table_of(space, "prefill", 100.0, saved, {"attention": 0.2, "mlp": 0.3})
    assert split.fixed == pytest.approx(0, abs=1e-9)
    for sub_network in (space.full(), space.smallest(), SubNetwork((0, 1, 0, 1, 2, 3))):
        assert split.cost(sub_network) == pytest.approx(calm.cost(sub_network))
    # blocks that save more than all takes
    wild = table_of(space, "prefill", 100.0, {("attention", 0): 0.1, ("mlp", 0): 0.5}, shares)
    assert wild.full == pytest.approx(100)
    assert min(wild.fixed, *(cost for row in wild.blocks for cost in row)) >= -1e-9
    assert wild.smallest < 10


def test_passes_are_those_of_generation(backbone):
    shapes = []
    handle = backbone.model.register_forward_pre_hook(
        lambda _, args, kw: shapes.append((tuple(args[0].shape), kw["past_key_values"].get_seq_length())),
        with_kwargs=True,
    )
    passes = Passes(backbone, backbone.space.smallest(), WORKLOAD)
    passes.prefill()
    passes.decode()
    passes.decode()
    handle.remove()
    # 12 prompt tokens and half of the 5 generated ones: the token at work is the 14th
    assert shapes == [((2, 12), 0), ((2, 13), 0), ((2, 1), 13), ((2, 1), 13)]


def test_passes_over_a_text_read_its_tokens_in_turn(backbone):
    seen = []
    handle = backbone.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    text = torch.arange(2 * WORKLOAD.total_tokens).view(2, -1) % 60
    passes = Passes(backbone, backbone.space.full(), WORKLOAD, text)
    passes.prefill()
    for _ in range(4):
        passes.decode()
    handle.remove()
    prompt, before, *steps = seen
    assert torch.equal(prompt, text[:, :12])
    assert torch.equal(before, text[:, :13])
    # 16 tokens are fed in all: those at places 13 to 15, then the first of them again
    assert [torch.equal(step, text[:, place : place + 1]) for step, place in zip(steps, (13, 14, 15, 13), strict=True)]
    assert not torch.equal(steps[0], steps[1])


def test_a_window_shorter_than_the_workload_is_decoded_behind():
    backbone = ElasticBackbone(MODELS["mistral-window"](), SPACE)
    passes = Passes(backbone, backbone.space.smallest(), WORKLOAD)
    assert backbone.model.config.sliding_window < WORKLOAD.prompt_tokens
    for _ in range(3):
        passes.decode()
        # the window, and what is kept so that the last step can be taken back
        assert passes._half_way.get_seq_length() == 13


def test_a_real_profile_has_a_time_for_everything(backbone):
    found = profile(backbone, WORKLOAD, budget_seconds=0.3, held_out=2)
    for phase in found.phases.values():
        assert phase.table.full > 0
        assert phase.error >= 0
    assert set(found.tables()) == {"prefill", "decode", "latency"}
    scoring = profile(
        backbone, Workload(prompt_tokens=8, generated_tokens=1, threads=1), budget_seconds=0.1, held_out=0
    )
    assert set(scoring.tables()) == {"prefill", "latency"}
    assert scoring.phases["prefill"].error is None


def test_the_backbone_is_left_as_it_was(backbone, tokens):
    backbone.model.train()
    threads = torch.get_num_threads()
    profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=1)
    assert backbone.model.training
    assert torch.get_num_threads() == threads
    assert not any(e.module._forward_hooks or e.module._forward_pre_hooks for e in backbone.blocks)


def test_what_does_not_fit_in_memory_is_one_clear_error(backbone, monkeypatch):
    def full(self, ids, cache):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Passes, "_run", full)
    with pytest.raises(ValueError, match=r"does not fit in memory \(2 x 12 tokens.*lower batch_size"):
        profile(backbone, WORKLOAD)

    def other(self, ids, cache):
        raise RuntimeError("something else")

    monkeypatch.setattr(Passes, "_run", other)
    with pytest.raises(RuntimeError, match="something else"):
        profile(backbone, WORKLOAD)


def test_a_workload_longer_than_learnt_positions_is_refused(backbone):
    learnt = ElasticBackbone(make_gpt2(), SPACE)
    for each, tokens in ((learnt, 9), (backbone, 10)):
        workload = Workload(prompt_tokens=120, generated_tokens=tokens, threads=1)
        profile(each, workload, budget_seconds=0.05, held_out=0)
    with pytest.raises(ValueError, match="takes 129 positions, but the model has 128; lower prompt_tokens"):
        profile(learnt, Workload(prompt_tokens=120, generated_tokens=10, threads=1))


# --- the file ---------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(backbone, machine, tmp_path):
    machine["noise"] = 0.01
    found = profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=3)
    path = found.write(tmp_path)
    assert path.name == "latency-cpu-2x12+5-float32.json"
    assert read_all(tmp_path, backbone.space) == {path: found}
    assert LatencyTable.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_table_of_other_conditions_is_refused_with_what_differs(backbone, machine):
    found = profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=0)
    found.check(conditions(backbone, WORKLOAD))
    longer = Workload(batch_size=2, prompt_tokens=99, generated_tokens=5, threads=1)
    with pytest.raises(ValueError, match=r"(?s)other conditions.*workload.prompt_tokens: 12 -> 99.*main.py profile"):
        found.check(conditions(backbone, longer))
    half = Workload(batch_size=2, prompt_tokens=12, generated_tokens=5, dtype="bfloat16", threads=1)
    with pytest.raises(ValueError, match="workload.dtype: 'float32' -> 'bfloat16'"):
        found.check(conditions(backbone, half))
    elsewhere = conditions(backbone, WORKLOAD) | {"device": {"type": "cuda", "name": "NVIDIA H100"}}
    with pytest.raises(ValueError, match="device.type: 'cpu' -> 'cuda'\n  device.name: .* -> 'NVIDIA H100'"):
        found.check(elsewhere)
    other = ElasticBackbone(make_llama(), SpaceConfig(mlp=[32, 64], attention=[0, 1, 2, 4]))
    with pytest.raises(ValueError, match="model.space"):
        found.check(conditions(other, WORKLOAD))


def test_a_damaged_file_is_one_clear_error(backbone, machine, tmp_path):
    path = profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=0).write(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="is damaged .*; delete it and profile again"):
        read_all(tmp_path, backbone.space)


def test_a_file_of_another_space_is_refused(backbone, machine, tmp_path):
    profile(backbone, WORKLOAD, budget_seconds=0.1, held_out=0).write(tmp_path)
    other = ElasticBackbone(make_llama(), SpaceConfig(mlp=[32, 64], attention=[1, 2, 4]))
    with pytest.raises(ValueError, match="3 choices for|4 choices for"):
        read_all(tmp_path, other.space)


def test_workloads_have_names():
    assert all(named(name).name == name for name in WORKLOADS)
    assert named("chat", dtype="bfloat16", threads=3).name == "chat"
    assert named("chat", prompt_tokens=7).name == "1x7+64"
    with pytest.raises(ValueError, match="no workload 'talk'; there are chat"):
        named("talk")
    with pytest.raises(ValueError, match="dtype is one of float32, bfloat16, float16, not 'int8'"):
        named("chat", dtype="int8")
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        named("chat", threads=0)


def test_a_sample_of_short_passes_is_many_of_them_while_there_is_time(backbone, machine, monkeypatch):
    monkeypatch.setattr(profiler, "SAMPLE_SECONDS", 10.0)
    small = {"small": backbone.space.smallest()}

    def passes(seconds):
        machine["passes"] = 0
        found = profiler.measure(backbone, WORKLOAD, "prefill", small, seconds)
        assert found.reference == pytest.approx(truth(backbone, backbone.space.full()) * 12 / 1e3)
        return machine["passes"]

    # as many rounds as there may be, each of three samples, and as many passes in one as make it long enough; before
    # them one of each, and a round of single ones
    each = math.ceil(10.0 / (truth(backbone, backbone.space.full()) * 12 / 1e3))
    assert each > 2
    assert passes(1e6) == 2 + 3 + 3 * each * profiler.MOST_ROUNDS
    # the control: no time for any
    assert passes(0) == 2 + 3 + 3 * profiler.LEAST_ROUNDS
