import pytest
import torch

from flextron_lit.losses.cross_entropy import cross_entropy, distillation, mean_cross_entropy


@pytest.fixture
def logits(generator):
    return torch.randn(2, 5, 7, generator=generator)


LABELS = torch.tensor([[1, 2, -100, 3, 4], [-100, 0, 1, 6, 6]])


def test_cross_entropy_is_huggingfaces_in_sums(logits, model, tokens):
    labels = tokens.clone()
    labels[0, 3] = -100
    output = model(tokens, labels=labels)
    total, count = cross_entropy(output.logits, labels)
    assert count == 2 * 18 - 1
    torch.testing.assert_close(total / count, output.loss)
    torch.testing.assert_close(mean_cross_entropy(output.logits, labels), output.loss)


def test_cross_entropy_by_hand(logits):
    total, count = cross_entropy(logits, LABELS)
    log_probabilities = logits.log_softmax(-1)
    pairs = [(0, 0, 2), (0, 2, 3), (0, 3, 4), (1, 0, 0), (1, 1, 1), (1, 2, 6), (1, 3, 6)]
    assert count == len(pairs)
    torch.testing.assert_close(total, -sum(log_probabilities[b, t, v] for b, t, v in pairs))


def test_nothing_to_predict_gives_zero_not_nan(logits):
    labels = torch.full_like(LABELS, -100)
    assert mean_cross_entropy(logits, labels) == 0
    assert distillation(logits, logits + 1, labels) == 0


def test_distillation_is_the_kl_divergence(logits, generator):
    teacher = torch.randn(logits.shape, generator=generator).requires_grad_()
    student = logits.clone().requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    by_hand = (p * (p.log() - q.log())).sum(-1)[:, :-1]
    kept = LABELS[:, 1:] != -100
    loss = distillation(student, teacher, LABELS)
    torch.testing.assert_close(loss, by_hand[kept].mean())
    assert distillation(teacher, teacher, LABELS).abs() < 1e-6 < loss
    loss.backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
