"""Counted costs of a dynamic router against what torch counts in grouped execution, for every family."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from flextron_lit.costs import COUNTED, DYNAMIC_COUNTED, Workload, dynamic_table
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.kv_cache import fill
from flextron_lit.latency.mixtures import router_products
from tests.conftest import space_for
from tests.costs.test_counted import WORKLOAD, cache_of, counted_by_torch

ALONE = replace(WORKLOAD, batch_size=1)


@pytest.fixture
def backbone(model):
    # torch's counter sees nothing of sdpa on a CPU
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return ElasticBackbone(eager, space_for(eager))


class Routed:
    """A router's products, and given choices [2L, B, T]."""

    def __init__(self, backbone, choices):
        self.products = router_products(backbone)
        self.choices = choices
        self.counts = torch.zeros(len(choices), backbone.space.num_choices, dtype=torch.float64)

    def begin(self, real):
        pass

    def choose(self, block, hidden_states):
        F.linear(hidden_states, *self.products[block])
        return self.choices[block]

    def note(self, block, counts):
        self.counts[block, : len(counts)] = torch.tensor(counts)

    @property
    def shares(self):
        return self.counts / self.counts.sum(-1, keepdim=True)


def choices_of(space, batch, tokens, generator):
    counts = torch.tensor([len(block.widths) for block in space.blocks])[:, None, None]
    return (torch.rand(len(space), batch, tokens, generator=generator) * counts).long()


def counted(backbone, policy, *shape, **options):
    ids = torch.ones(*shape, dtype=torch.long)
    if "past_key_values" in options:
        # as if its own: what is in it is not looked at
        fill(options["past_key_values"], policy)
    with backbone.use(policy):
        return counted_by_torch(lambda: backbone.model(ids, logits_to_keep=1, **options))


def expected(backbone, name, workload, policy):
    return dynamic_table(backbone, name, workload).expected(policy.shares).item()


def test_a_prefill_of_tokens_of_all_widths_is_what_torch_counts(backbone, generator):
    space, seen = backbone.space, set()
    for _ in range(10):
        choices = choices_of(space, 2, 17, generator)
        # attention runs over the groups of the widest token
        choices[:, 0, 0] = torch.tensor(space.full().choices)
        policy = Routed(backbone, choices)
        found = counted(backbone, policy, 2, 17, use_cache=False)
        assert found == pytest.approx(expected(backbone, "prefill_flops", WORKLOAD, policy), rel=1e-12)
        seen.add(found)
    assert len(seen) > 5


def test_tokens_that_are_all_alike_save_but_what_attention_over_pairs_is_fixed_at(backbone, generator):
    table = dynamic_table(backbone, "prefill_flops", WORKLOAD)
    for _ in range(10):
        sub_network = backbone.space.random(generator)
        policy = Routed(backbone, torch.tensor(sub_network.choices)[:, None, None].expand(-1, 2, 17))
        unused = sum(
            (e.block.full - width) * e.heads_per_unit * e.head_dim
            for e, width in zip(backbone.blocks, backbone.space.widths(sub_network), strict=True)
            if e.block.kind == "attention"
        )
        found = counted(backbone, policy, 2, 17, use_cache=False)
        assert unused
        assert found == table.cost(sub_network) - 2 * 2 * 2 * 17 * 17 * unused


def test_a_token_alone_takes_its_own_width_of_everything_but_keys_and_values(backbone, generator):
    before = int(ALONE.decode_context) - 1
    for _ in range(10):
        policy = Routed(backbone, choices_of(backbone.space, 1, 1, generator))
        cache = cache_of(backbone.model, before)
        cache.batch_select_indices(torch.tensor([0]))
        found = counted(backbone, policy, 1, 1, past_key_values=cache)
        assert found == pytest.approx(expected(backbone, "decode_flops", ALONE, policy), rel=1e-12)


def test_the_tokens_of_a_batch_attend_with_the_width_of_the_widest(backbone, generator):
    choices = choices_of(backbone.space, 2, 1, generator)
    choices[:, 0, 0] = torch.tensor(backbone.space.full().choices)
    policy = Routed(backbone, choices)
    found = counted(backbone, policy, 2, 1, past_key_values=cache_of(backbone.model, int(WORKLOAD.decode_context) - 1))
    assert found == pytest.approx(expected(backbone, "decode_flops", WORKLOAD, policy), rel=1e-12)
    alone = expected(backbone, "decode_flops", ALONE, policy)
    assert 2 * alone < found


@pytest.mark.parametrize("name", DYNAMIC_COUNTED)
@pytest.mark.parametrize("workload", [WORKLOAD, ALONE], ids=["batch", "alone"])
def test_ratios_are_of_the_static_full_network(backbone, name, workload):
    table, static = dynamic_table(backbone, name, workload), COUNTED[name](backbone, workload)
    table.check(backbone.space)
    assert table.name == name
    assert table.full == static.full
    full, features = backbone.space.full(), backbone.model.config.hidden_size
    choices = sum(len(block.widths) for block in backbone.space.blocks)
    tokens = {"prefill_flops": 17, "decode_flops": 1, "flops": 17 + 5}[name] * workload.batch_size
    # at full width everything is as in the static network, and routers are what is added
    assert table.cost(full) == pytest.approx(static.full + 2 * tokens * choices * features, rel=1e-12)
    assert table.ratio(full) > 1
    assert all(row[0] == 0 for row in table.blocks[1:])
    assert table.ratio(backbone.space.smallest()) > static.ratio(backbone.space.smallest())


@pytest.mark.parametrize("name", sorted(set(COUNTED) - set(DYNAMIC_COUNTED)))
def test_a_cost_that_no_choice_changes_is_refused(backbone, name):
    with pytest.raises(ValueError, match=f"{name} is the same whatever .* all weights and all keys .* static router"):
        dynamic_table(backbone, name, WORKLOAD)


def test_an_unknown_cost_is_refused(backbone):
    with pytest.raises(ValueError, match="no counted cost 'weight' of a dynamic router; there are flops, pre"):
        dynamic_table(backbone, "weight", Workload())
