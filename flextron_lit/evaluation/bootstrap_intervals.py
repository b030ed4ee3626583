"""How far a mean over documents may be off: the bootstrap."""

import torch

from flextron_lit.evaluation.document_losses import Losses

DRAWS = 2000
BOUNDS = (0.025, 0.975)

Interval = tuple[float, float]


def interval(losses: Losses, seed: int = 0) -> Interval | None:
    """95 % interval of a mean loss per token, documents drawn with replacement (percentile bootstrap, Efron 1979).

    Of a difference of two networks on the same documents (`ours - theirs`) it is the paired one: both are seen on the
    documents that were drawn.

    Args:
        losses: of n documents.
        seed: of the draws; the same documents are drawn for all networks.

    Returns:
        None for a single document, of which nothing can be said.
    """
    count = len(losses.total)
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (DRAWS, count), generator=generator)
    means = losses.total[drawn].sum(1) / losses.tokens[drawn].sum(1)
    low, high = means.quantile(torch.tensor(BOUNDS, dtype=means.dtype)).tolist()
    return low, high
