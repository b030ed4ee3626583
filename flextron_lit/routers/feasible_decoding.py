"""Feasible decoding: sub-networks that exceed no limit and leave nothing unused that a surrogate would spend (ours).

The bare arg-max of a router exceeds some budgets and leaves part of others unused: training penalises what exceeds them
but cannot forbid it, and every block chooses for itself. Here blocks are narrowed where the surrogate says that it
costs least, until every limit holds, then changed where it says that it helps most, one at a time or two against each
other, while they do. Greedily: there are too many sub-networks to try, but all changes of one block are predicted at
once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flextron_lit.costs import CostTable
from flextron_lit.space import ElasticSpace

ROWS_AT_ONCE = 2**14
PAIRS_AT_ONCE = 2**22
PROMISING = 256
"""Changes that are paired with each other: all of them in spaces of up to 256 choices in all blocks together."""
LEAST_GAIN = 1e-4
"""Below it a predicted gain may be rounding, and two changes could take turns for ever."""
ROUNDING = 1e-12


class Predict(Protocol):
    """What is to be small: a surrogate's prediction, for one."""

    def __call__(self, one_hot: Tensor, /) -> Tensor:
        """Choices [..., 2L, N] to what is to be small, [...]."""

    def after_changes(self, choices: Tensor) -> Tensor:
        """The same after every change of a single block, [R, 2L] to [R, 2L, N]: cheaper than each by itself."""


@dataclass(frozen=True)
class Additive:
    """What is to be small is the sum of what every choice adds: minus a router's logits, for one."""

    effects: Tensor
    """[2L, N], finite."""

    def __call__(self, one_hot: Tensor) -> Tensor:
        """Choices [..., 2L, N] to their sum, [...]."""
        return (one_hot * self.effects).sum((-2, -1))

    def after_changes(self, choices: Tensor) -> Tensor:
        """Sums after every change of a single block, [R, 2L] to [R, 2L, N]."""
        now = self.effects.gather(1, choices.T).T
        return now.sum(1)[:, None, None] + self.effects - now[..., None]


@dataclass(frozen=True)
class Bound:
    """A cost that must not exceed a value of its own in each of R rows."""

    table: CostTable
    values: Tensor
    """[R], in the table's unit."""

    def costs(self, choices: Tensor) -> Tensor:
        """[R, 2L] to [R]."""
        return self.table.fixed + self.table.padded.gather(1, choices.T).sum(0)

    def changes(self, choices: Tensor) -> Tensor:
        """What changing one block alone does to the cost, as a share of the bound: [R, 2L, N]."""
        now = self.table.padded.gather(1, choices.T).T
        return (self.table.padded - now[..., None]) / self.values[:, None, None]


def decode(space: ElasticSpace, choices: Tensor, bounds: Sequence[Bound], predict: Predict) -> tuple[Tensor, Tensor]:
    """Make choices feasible, then spend what is left.

    Args:
        space: the choices there are.
        choices: [R, 2L], for example a router's arg-max.
        bounds: what each row must not exceed.
        predict: the surrogate.

    Returns:
        Choices [R, 2L], and whether each row meets all its bounds [R]. With one bound every row does that can, since
        narrowing ends at the smallest network; with several a block may help one and hurt another.
    """
    choices = spend(space, repair(space, choices, bounds, predict), bounds, predict)
    return choices, _excess(choices, bounds) == 0


def repair(space: ElasticSpace, choices: Tensor, bounds: Sequence[Bound], predict: Predict) -> Tensor:
    """Change one block of every infeasible row at a time: least predicted loss for what it brings nearer the bounds."""
    choices = choices.clone()
    active = torch.arange(len(choices))
    while len(active := active[_excess(choices[active], _rows(bounds, active)) > 0]):
        rows, own = choices[active], _rows(bounds, active)
        gained = _excess(rows, own)[:, None, None] - _excess_after(rows, own)
        useful = (gained > ROUNDING) & space.exists
        losses = -_gains(rows, space.num_choices, predict)
        price = torch.where(useful, losses / gained.clamp(min=ROUNDING), torch.inf)
        # a change that even lowers the loss is taken by what it gains most
        active, moved = _apply(active, rows, price)
        choices[active] = moved
    return choices


def spend(space: ElasticSpace, choices: Tensor, bounds: Sequence[Bound], predict: Predict) -> Tensor:
    """Change one block of every row at a time while the bounds hold: most predicted gain for its cost.

    Where no single change helps, one block is narrowed to widen another; ends where that does not help either.
    """
    choices = choices.clone()
    active = torch.arange(len(choices))
    while len(active):
        rows, own = choices[active], _rows(bounds, active)
        gains = _gains(rows, space.num_choices, predict).masked_fill(~space.exists, -torch.inf)
        allowed = (_excess_after(rows, own) == 0) & (gains > LEAST_GAIN)
        paid = torch.stack([bound.changes(rows) for bound in own]).sum(0)
        price = torch.where(allowed, -gains / paid.clamp(min=1e-6), torch.inf)
        alone, moved = _apply(active, rows, price)
        choices[alone] = moved
        stuck = ~torch.isin(active, alone)
        swapped, moved = _exchange(active[stuck], rows[stuck], gains[stuck], _rows(own, stuck), predict)
        choices[swapped] = moved
        active = torch.cat([alone, swapped])
    return choices


def _exchange(
    active: Tensor, rows: Tensor, gains: Tensor, bounds: Sequence[Bound], predict: Predict
) -> tuple[Tensor, Tensor]:
    """The change of two blocks of every row that promises most: which rows it helps, and what they become.

    What it promises is the sum of both changes alone; what counts is the prediction of both together.
    """
    if not len(rows):
        return active, rows
    num_choices = gains.shape[-1]
    at_once = max(1, PAIRS_AT_ONCE // min(PROMISING, gains[0].numel()) ** 2)
    chunks = torch.arange(len(rows)).split(at_once)
    both = torch.cat([_best_pair(rows[c], gains[c].flatten(1), _rows(bounds, c)) for c in chunks])  # [R, 2]
    moved = rows.scatter(1, both // num_choices, both % num_choices)
    before, after = (predict(F.one_hot(each, num_choices).float()) for each in (rows, moved))
    helped = (before - after > LEAST_GAIN) & (_excess(moved, bounds) == 0)
    return active[helped], moved[helped]


def _best_pair(rows: Tensor, gains: Tensor, bounds: Sequence[Bound]) -> Tensor:
    """Two changes of different blocks, as positions in [2L x N]: the largest sum of gains within the bounds; [R, 2].

    The first is one of those that gain most, the second one of those that free most cost for what they lose.
    """
    size = gains.shape[1]
    changes = [bound.changes(rows).flatten(1) for bound in bounds]
    freed = -torch.stack(changes).sum(0)
    price = torch.where(freed > 0, -gains / freed.clamp(min=ROUNDING), torch.inf)
    first = gains.topk(min(PROMISING, size)).indices
    second = price.topk(min(PROMISING, size), largest=False).indices
    block = torch.arange(size) * rows.shape[1] // size
    allowed = block[first][:, :, None] != block[second][:, None]
    for bound, change in zip(bounds, changes, strict=True):
        room = 1 + ROUNDING - bound.costs(rows) / bound.values
        allowed &= change.gather(1, first)[:, :, None] + change.gather(1, second)[:, None] <= room[:, None, None]
    total = gains.gather(1, first)[:, :, None] + gains.gather(1, second)[:, None]
    best = torch.where(allowed, total, -torch.inf).flatten(1).argmax(-1)
    of_first, of_second = best // second.shape[1], best % second.shape[1]
    return torch.cat([first.gather(1, of_first[:, None]), second.gather(1, of_second[:, None])], dim=1)


def _apply(active: Tensor, rows: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest change of every row that has one: which rows, and what they become."""
    best = price.flatten(1).min(-1)
    possible = best.values < torch.inf
    block, choice = best.indices // price.shape[-1], best.indices % price.shape[-1]
    moved = rows.scatter(1, block[:, None], choice[:, None])
    return active[possible], moved[possible]


def _rows(bounds: Sequence[Bound], rows: Tensor) -> list[Bound]:
    return [Bound(bound.table, bound.values[rows]) for bound in bounds]


def _excess(choices: Tensor, bounds: Sequence[Bound]) -> Tensor:
    """By which share of the bounds they are exceeded together, [R]; 0 where all hold."""
    return torch.stack([b.costs(choices) / b.values - 1 - ROUNDING for b in bounds]).clamp(min=0).sum(0)


def _excess_after(choices: Tensor, bounds: Sequence[Bound]) -> Tensor:
    """Of all single changes, [R, 2L, N]."""
    each = [(b.costs(choices) / b.values)[:, None, None] + b.changes(choices) - 1 - ROUNDING for b in bounds]
    return torch.stack(each).clamp(min=0).sum(0)


@torch.no_grad()
def _gains(choices: Tensor, num_choices: int, predict: Predict) -> Tensor:
    """By how much every single change lowers what is predicted, [R, 2L, N]; choices that do not exist mean nothing."""
    at_once = max(1, ROWS_AT_ONCE // (choices.shape[1] * num_choices))
    now = predict(F.one_hot(choices, num_choices).float()).double()
    after = [predict.after_changes(part).double() for part in choices.split(at_once)]
    return now[:, None, None] - torch.cat(after)
