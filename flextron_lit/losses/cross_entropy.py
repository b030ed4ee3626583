"""Losses of a causal LM as pure functions; labels are in the Hugging Face convention (-100 is not predicted)."""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed language loss in nats, and the number of tokens predicted (to weight by).

    Args:
        logits: [B, T, V]; position t predicts token t + 1.
        labels: [B, T]; -100 at a token that is not to be predicted.
    """
    targets = labels[:, 1:].flatten()
    predictions = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum"), (targets != IGNORED).sum()


def token_cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Language loss of every position in nats, [B, T - 1], and which of them predict a token; the others have 0.

    Shapes as in `cross_entropy`.
    """
    targets = labels[:, 1:]
    predictions = logits[:, :-1].flatten(0, 1).float()
    losses = F.cross_entropy(predictions, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape), targets != IGNORED


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Language loss in nats per predicted token; 0 where nothing is predicted. Shapes as in `cross_entropy`."""
    total, tokens = cross_entropy(logits, labels)
    return total / tokens.clamp(min=1)


def distillation(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) in nats per predicted token, times the squared temperature (Hinton et al. 2015).

    Args:
        student: logits [B, T, V]; gradients flow here only.
        teacher: logits [B, T, V].
        labels: [B, T]; positions that predict nothing do not count.
        temperature: divides the logits of both; the factor keeps the size of the gradients.
    """
    counted = labels[:, 1:] != IGNORED  # [B, T - 1]
    predicted = (student[:, :-1].float() / temperature).log_softmax(-1)
    wanted = (teacher[:, :-1].detach().float() / temperature).log_softmax(-1)
    divergence = F.kl_div(predicted, wanted, reduction="none", log_target=True).sum(-1)  # [B, T - 1]
    return temperature**2 * (divergence * counted).sum() / counted.sum().clamp(min=1)
