import pytest
import torch

from flextron_lit.routers.noise import Temperature, entropy, gumbel_noise, straight_through
from tests.options import seed


def test_choices_are_exactly_one_hot_and_carry_the_soft_gradients(generator):
    logits = torch.randn(5, 6, 4, generator=generator, requires_grad=True)
    noise = gumbel_noise((5, 6, 4), generator)
    hard = straight_through(logits, noise, 0.7)
    assert ((hard == 0) | (hard == 1)).all()
    assert (hard.sum(-1) == 1).all()
    weights = torch.randn(5, 6, 4, generator=generator)
    (got,) = torch.autograd.grad((hard * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((((logits + noise) / 0.7).softmax(-1) * weights).sum(), logits)
    assert torch.allclose(got, wanted)
    assert got.abs().max() > 0


def test_frequencies_are_those_of_the_softmax(generator):
    logits = torch.tensor([0.0, 1.0, 2.0])
    noise = gumbel_noise((20_000, 3), generator)
    assert noise.isfinite().all()
    drawn = straight_through(logits.expand(20_000, 3), noise, 1.0).mean(0)
    assert torch.allclose(drawn, logits.softmax(-1), atol=0.02)
    # without noise the largest always wins
    assert straight_through(logits, torch.zeros(3), 1.0).argmax() == 2


def test_a_choice_that_does_not_exist_is_never_taken(generator):
    logits = torch.tensor([0.0, -torch.inf, 0.0]).expand(1000, 3).clone().requires_grad_()
    hard = straight_through(logits, gumbel_noise((1000, 3), generator), 5.0)
    assert hard[:, 1].sum() == 0
    (gradient,) = torch.autograd.grad((hard * torch.tensor([1.0, 2.0, 3.0])).sum(), logits)
    assert gradient.isfinite().all()


def test_the_same_generator_gives_the_same_noise_and_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    one, other = (gumbel_noise((7,), torch.Generator().manual_seed(seed(5))) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(one, gumbel_noise((7,), torch.Generator().manual_seed(seed(6))))
    assert torch.equal(before, torch.get_rng_state())


def test_the_temperature_falls_from_start_to_end():
    temperature = Temperature(start=4.0, end=0.25)
    assert [temperature.at(share) for share in (0, 0.5, 1, 2)] == pytest.approx([4.0, 1.0, 0.25, 0.25])
    with pytest.raises(ValueError, match="above 0"):
        Temperature(end=0.0)


def test_entropy_is_1_for_uniform_and_0_for_decided_choices():
    exists = torch.tensor([[True, True, True], [True, True, False]])
    uniform = torch.zeros(2, 3).masked_fill(~exists, -torch.inf)
    assert entropy(uniform).item() == pytest.approx(1.0)
    assert entropy(uniform + torch.tensor([100.0, 0.0, 0.0])).item() == pytest.approx(0.0, abs=1e-6)
    assert entropy(torch.zeros(4, 2, 3)).shape == (4,)
