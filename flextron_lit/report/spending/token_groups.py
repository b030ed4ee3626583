"""Means over groups of tokens: by class, and by how hard the next token is to predict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flextron_lit.report.spending.routed_text import VALUES, RoutedText, means_of
from flextron_lit.report.spending.token_classes import TOKEN_CLASSES

QUARTERS = ("easiest quarter", "second quarter", "third quarter", "hardest quarter")
"""Of the tokens, by the full network's loss of the token that follows."""
RARE = 0.01
"""Share of the tokens below which a class is not named as the one that gets most or least."""
NOTICEABLE = 0.005
"""Difference of mean costs below which classes of tokens are said to get the same."""
ALL = "all"
"""Stands for all tokens and for all domains."""


@dataclass(frozen=True)
class Group:
    """Tokens that have something in common, and their means."""

    domain: str
    """`all`, or one."""
    name: str
    """`all`, a token class, or a quarter of the tokens by loss."""
    tokens: int
    means: Mapping[str, float]
    """Of `VALUES`; a loss is nan where no token of the group predicts one."""

    def row(self) -> dict[str, str | int | float]:
        """For files."""
        return {"domain": self.domain, "group": self.name, "tokens": self.tokens, **self.means}

    def cells(self) -> list[str]:
        """For people: name, tokens, cost, widths of MLP and attention, the router's loss and the full network's."""
        shares = [f"{self.means[name]:.0%}" for name in ("mlp_width", "attention_width")]
        losses = ["" if math.isnan(self.means[name]) else f"{self.means[name]:.2f}" for name in ("loss", "full_loss")]
        return [self.name, str(self.tokens), f"{self.means['cost']:.3f}", *shares, *losses]


def groups_of(texts: Mapping[str, RoutedText]) -> list[Group]:
    """Groups of all domains together, then of each: all tokens, their classes, quarters by loss.

    Groups without a token are left out. Quarters are those of all domains together.

    Args:
        texts: by domain.
    """
    together = {name: torch.cat([text.values[name] for text in texts.values()]) for name in VALUES}
    classes = [label for text in texts.values() for label in text.classes]
    quarters = _quarters(together["full_loss"])
    groups = _grouped(ALL, together, classes, quarters)
    start = 0
    for domain, text in texts.items():
        groups += _grouped(domain, text.values, text.classes, quarters[start : start + len(text)])
        start += len(text)
    return groups


def _quarters(losses: Tensor) -> list[str | None]:
    """Quarter of every token, from the lowest losses to the highest; None for a token without a loss."""
    known = losses[~losses.isnan()]
    if not len(known):
        return [None] * len(losses)
    borders = known.quantile(torch.tensor([0.25, 0.5, 0.75]))
    found = torch.bucketize(losses, borders)
    return [None if loss.isnan() else QUARTERS[int(index)] for loss, index in zip(losses, found, strict=True)]


def _grouped(
    domain: str, values: Mapping[str, Tensor], classes: Sequence[str], quarters: Sequence[str | None]
) -> list[Group]:
    groups = {ALL: [True] * len(classes)}
    groups |= {name: [label == name for label in classes] for name in TOKEN_CLASSES}
    groups |= {name: [label == name for label in quarters] for name in QUARTERS}
    return [
        Group(domain, name, sum(members), means_of(values, torch.tensor(members)))
        for name, members in groups.items()
        if any(members)
    ]


def summary(groups: Sequence[Group], router: str, cost: str) -> str:
    """One line: which class of tokens gets most and which least, and what the next token's loss has to do with it.

    Args:
        groups: as `groups_of` gives them.
        router: what to call it.
        cost: what is counted.
    """
    overall = {group.name: group for group in groups if group.domain == ALL}
    known = [overall[name] for name in TOKEN_CLASSES if name in overall]
    common = [group for group in known if group.tokens >= RARE * overall[ALL].tokens]
    classes = sorted(common, key=lambda group: group.means["cost"])
    least, most = classes[0], classes[-1]
    said = f"{router} spends {overall[ALL].means['cost']:.3f} of the full network's {cost} on a token"
    if most.means["cost"] - least.means["cost"] < NOTICEABLE:
        said += ", about the same on every class"
    else:
        said += f": most on {_named(most)}, least on {_named(least)}"
    ends = [overall[name] for name in (QUARTERS[-1], QUARTERS[0]) if name in overall]
    if len(ends) == 2:
        hard, easy = (group.means["cost"] for group in ends)
        said += f"; {hard:.3f} where the next token is hard to predict, {easy:.3f} where it is easy"
    return said


def _named(group: Group) -> str:
    return f"{group.name} ({group.means['cost']:.3f})"
