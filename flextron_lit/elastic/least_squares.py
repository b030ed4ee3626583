"""Order and reconstruction in closed form, from the second moments of what an output projection reads (ours).

Shapes here: U units of a block, R rows of a unit (neurons have one), w units of a narrower width. `gram` is the mean
of h h^T over tokens, [U x R, U x R], with h what the output projection [D, U x R] reads.
"""

import torch
from torch import Tensor

RIDGE = 1e-3
"""Of the mean square of what is read."""
NEURONS_AT_ONCE, UPDATES = 16, 96
"""How many neurons are picked between two updates of what is left: at least so many, or units over so many updates."""


def rows_of(units: Tensor, rows: int) -> Tensor:
    """Where the rows of some units stand, [n] to [n x R]."""
    return (units[:, None] * rows + torch.arange(rows, device=units.device)).flatten()


def greedy_order(gram: Tensor, projection: Tensor, units: int, picks: int, ridge: float = RIDGE) -> Tensor:
    """Units in the order in which they explain most of what is left of the projection's output.

    Forward selection by a pivoted Cholesky factorisation. It counts on a projection of its own for each width: with the
    shared one, the first units of this order are worse than those of largest magnitude.

    Args:
        gram: [U x R, U x R].
        projection: [D, U x R].
        units: U.
        picks: how many to pick so; the others follow by what each explains alone of what is then left.
        ridge: added to the diagonal, as a share of its mean.

    Returns:
        A permutation, int64 [U].
    """
    rows = len(gram) // units
    left_gram = _with_ridge(gram, ridge * gram.diagonal().mean())
    left_output = gram @ projection.T
    free = torch.ones(units, dtype=torch.bool, device=gram.device)
    order: list[int] = []
    while len(order) < picks:
        # of large blocks more: there it is the number of updates that takes the time
        many = max(NEURONS_AT_ONCE, units // UPDATES) if rows == 1 else 1
        at_once = min(many, picks - len(order))
        best = _explained(left_gram, left_output, units).masked_fill(~free, -1.0).topk(at_once).indices
        order += best.tolist()
        free[best] = False
        picked = rows_of(best, rows)
        pivot = left_gram[picked][:, picked]
        factor = torch.linalg.cholesky(_with_ridge(pivot, 1e-6 * pivot.diagonal().mean()))
        basis = torch.linalg.solve_triangular(factor, left_gram[picked], upper=False)
        left_output -= basis.T @ torch.linalg.solve_triangular(factor, left_output[picked], upper=False)
        left_gram -= basis.T @ basis
    rest = _explained(left_gram, left_output, units).argsort(descending=True, stable=True)
    return torch.cat([torch.tensor(order, dtype=torch.long, device=gram.device), rest[free[rest]]])


def own_projection(gram: Tensor, projection: Tensor, columns: int, ridge: float = RIDGE) -> Tensor:
    """The projection of a narrower width that comes nearest to what the full one gives.

    `argmin |W h - V h[:n]|^2 + r |V - W[:, :n]|^2` in closed form: least squares towards the full output, held near the
    full projection's own columns.

    Args:
        gram: [U x R, U x R], units in their new order.
        projection: W [D, U x R].
        columns: n, those of the width.
        ridge: r, as a share of the mean square of what is read.

    Returns:
        V [D, n].
    """
    own = gram[:columns, :columns]
    strength = ridge * own.diagonal().mean()
    wanted = gram[:columns] @ projection.T + strength * projection[:, :columns].T
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(_with_ridge(own, strength))).T


def unit_scales(gram: Tensor, projection: Tensor, base: Tensor, width: int, rows: int, ridge: float = RIDGE) -> Tensor:
    """A factor for each unit of a narrower width, so that a given projection comes nearest to the full output.

    Args:
        gram: [U x R, U x R].
        projection: the full one, [D, U x R].
        base: what the width reads with, [D, w x R or more].
        width: w.
        rows: R.
        ridge: towards factors of 1, as a share of what a unit adds in the mean.

    Returns:
        [w].
    """
    columns = width * rows
    base = base[:, :columns]

    def by_unit(products: Tensor) -> Tensor:
        return products.unflatten(0, (width, rows)).unflatten(-1, (width, rows)).sum((1, 3))

    between = by_unit((base.T @ base) * gram[:columns, :columns])
    wanted = ((gram[:columns] @ projection.T) * base.T).sum(1).unflatten(0, (width, rows)).sum(1)
    strength = ridge * between.diagonal().mean()
    factor = torch.linalg.cholesky(_with_ridge(between, strength))
    return torch.cholesky_solve((wanted + strength)[:, None], factor)[:, 0]


def excess_loss(gram: Tensor, projection: Tensor, narrow: Tensor, fisher: Tensor) -> float:
    """What a block loses at a narrower width, in nats per token, to second order: `tr(F E) / 2` (ours).

    E is the covariance of what the width misses of the full output, F that of the loss's gradients at that output.

    Args:
        gram: [U x R, U x R].
        projection: [D, U x R].
        narrow: the width's, [D, n]; n may be 0.
        fisher: F [D, D], see `fisher.output_gradients`.
    """
    missed = -projection.clone()
    missed[:, : narrow.shape[1]] += narrow
    return float(((fisher @ missed) * (missed @ gram)).sum() / 2)


def _explained(left_gram: Tensor, left_output: Tensor, units: int) -> Tensor:
    """How much of what is left of the output each unit alone would explain, [U]."""
    rows = len(left_gram) // units
    if rows == 1:
        return left_output.square().sum(1) / left_gram.diagonal().clamp_min(torch.finfo(left_gram.dtype).tiny)
    each = torch.arange(units, device=left_gram.device)
    blocks = left_gram.unflatten(0, (units, rows)).unflatten(-1, (units, rows))[each, :, each]  # [U, R, R]
    floor = 1e-9 * left_gram.diagonal().abs().max() * torch.eye(rows, dtype=blocks.dtype, device=blocks.device)
    values, vectors = torch.linalg.eigh(blocks + floor)
    # of units that were picked nothing is left, and rounding can make that little negative
    outputs = vectors.mT @ left_output.unflatten(0, (units, rows))
    return (outputs.square().sum(-1) / values.clamp(min=floor[0, 0])).sum(-1)


def _with_ridge(matrix: Tensor, strength: Tensor) -> Tensor:
    """A copy with something added to the diagonal."""
    return matrix + strength * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
