import pytest
import torch

from flextron_lit.evaluation.bootstrap_intervals import interval
from flextron_lit.evaluation.document_losses import Losses

DOCUMENTS = 400


@pytest.fixture
def losses(generator):
    """Documents that differ much, and are of equal length."""
    tokens = torch.full((DOCUMENTS,), 10.0, dtype=torch.float64)
    return Losses((3 + torch.randn(DOCUMENTS, generator=generator, dtype=torch.float64)) * tokens, tokens)


def width(bounds):
    low, high = bounds
    return high - low


def test_the_interval_is_the_normal_one_where_documents_are_many(losses):
    low, high = interval(losses)
    error = 1.96 * float((losses.total / losses.tokens).std()) / DOCUMENTS**0.5
    assert low == pytest.approx(losses.mean - error, abs=0.15 * error)
    assert high == pytest.approx(losses.mean + error, abs=0.15 * error)


def test_the_seed_decides_the_draws(losses):
    assert interval(losses, seed=1) == interval(losses, seed=1)
    assert interval(losses, seed=1) != interval(losses, seed=2)


def test_a_paired_difference_is_known_better_than_both_losses(losses, generator):
    noise = 0.1 * torch.randn(DOCUMENTS, generator=generator, dtype=torch.float64)
    other = Losses(losses.total + (0.2 + noise) * losses.tokens, losses.tokens)
    low, high = interval(other - losses)
    # around what was drawn, and as wide as the noise alone makes it
    assert low < 0.2 + noise.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * float(noise.std()) / DOCUMENTS**0.5, rel=0.15)
    assert width(interval(losses)) > 5 * (high - low)
    # a constant difference is the same in every draw
    assert width(interval(Losses(losses.total + losses.tokens, losses.tokens) - losses)) == pytest.approx(0, abs=1e-12)


def test_long_documents_weigh_more():
    tokens = torch.tensor([1.0] * 50 + [1000.0] * 50, dtype=torch.float64)
    losses = Losses(tokens * torch.tensor([9.0] * 50 + [1.0] * 50, dtype=torch.float64), tokens)
    low, high = interval(losses)
    assert 1 < low <= losses.mean <= high < 1.1


def test_one_document_has_no_interval(losses):
    assert interval(Losses(losses.total[:1], losses.tokens[:1])) is None
    assert interval(Losses(losses.total[:2], losses.tokens[:2])) is not None
