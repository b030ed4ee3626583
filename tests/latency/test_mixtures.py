import pytest
import torch

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.latency.mixtures import DrawnChoices, router_products, shares
from flextron_lit.space import LayerWidths, SpaceConfig
from tests.conftest import make_llama
from tests.options import seed


def drawn(backbone, number=4, batch=1, tokens=1):
    generator = torch.Generator().manual_seed(seed(number))
    return DrawnChoices(router_products(backbone), shares(backbone.space, number), batch, tokens, generator)


def test_even_mixtures_are_the_same_in_every_layer_and_odd_ones_are_not(backbone):
    even, odd = shares(backbone.space, 4), shares(backbone.space, 5)
    assert torch.equal(even[1], even[3])
    assert torch.equal(even[2], even[4])
    assert not torch.equal(odd[1], odd[3])
    assert torch.equal(even, shares(backbone.space, 4))
    assert not torch.equal(even, shares(backbone.space, 6))
    # the attention of the first layer has no width 0: the same shares without it
    torch.testing.assert_close(even[0, :3], even[2, 1:] / even[2, 1:].sum())
    assert even[0, 3] == 0


def test_a_layer_of_other_widths_has_shares_of_its_own():
    layers = {1: LayerWidths(mlp=[8, 64])}
    space = ElasticBackbone(make_llama(), SpaceConfig(mlp=[16, 32, 64], attention=[2, 4], layers=layers)).space
    found = shares(space, 0)
    torch.testing.assert_close(found.sum(-1), torch.ones(len(space), dtype=torch.float64))
    assert (found[space.exists] > 0).all()
    assert (found[~space.exists] == 0).all()


def test_tokens_of_many_blocks_choose_alike_in_mixtures_like_a_trained_routers(backbone):
    alike = torch.stack([shares(backbone.space, number).max(-1).values == 1 for number in range(80)]).double()
    assert not alike[0::4].any()
    assert not alike[1::4].any()
    assert 0.5 < alike[2::4].mean() < 0.7
    assert 0.5 < alike[3::4].mean() < 0.7
    # block by block: not all in one pass
    assert 0 < alike[2].mean() < 1


def test_mixtures_spread_over_narrow_and_wide_for_each_kind_apart(backbone):
    at = torch.arange(backbone.space.num_choices, dtype=torch.float64)
    means = torch.stack([shares(backbone.space, number)[[1, 2]] @ at for number in range(0, 100, 2)])
    assert (means.max(0).values > 2.5).all()
    assert (means.min(0).values < 0.5).all()
    assert abs(torch.corrcoef(means.T)[0, 1]) < 0.4


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 19)])
def test_what_runs_is_what_was_drawn(backbone, batch, tokens):
    policy = drawn(backbone, batch=batch, tokens=tokens)
    ids = torch.ones(batch, tokens, dtype=torch.long)
    passes = len(policy.choices[0])
    assert passes * batch * tokens >= 32
    with backbone.use(policy), torch.no_grad():
        outputs = [backbone.model(ids, use_cache=False).logits for _ in range(passes)]
    tally = torch.tensor([row + [0] * (4 - len(row)) for row in policy.tally], dtype=torch.float64)
    torch.testing.assert_close(tally / tally.sum(-1, keepdim=True), policy.shares)
    assert passes == 1 or not torch.equal(*outputs[:2])
    assert (policy.shares[~backbone.space.exists] == 0).all()


def test_many_tokens_come_close_to_the_mixture(backbone):
    policy = drawn(backbone, tokens=4000)
    torch.testing.assert_close(policy.shares, shares(backbone.space, 4), atol=0.03, rtol=0)
    assert not torch.allclose(policy.shares, shares(backbone.space, 6), atol=0.03, rtol=0)


def test_a_pass_does_the_products_of_all_routers(backbone, monkeypatch):
    done = []
    policy = drawn(backbone)
    original = torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda self, *args: done.append(self.shape) or original(self, *args))
    with backbone.use(policy), torch.no_grad():
        backbone.model(torch.ones(1, 1, dtype=torch.long), use_cache=False)
    assert done == [(1, 1, len(block.widths)) for block in backbone.space.blocks]


def test_random_routers_choose_more_than_one_width(backbone):
    (weight, bias), *_ = router_products(backbone)
    assert weight.shape == (3, 32)
    chosen = (torch.randn(200, 32, generator=torch.Generator().manual_seed(seed(0))) @ weight.T + bias).argmax(-1)
    assert len(chosen.unique()) > 1


def test_nothing_is_drawn_from_the_global_generator(backbone):
    before = torch.get_rng_state()
    drawn(backbone)
    assert torch.equal(torch.get_rng_state(), before)
