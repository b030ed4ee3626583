"""How the units of a dense network are ordered, and made up for where widths leave them out, before training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from flextron_lit.data import TextDataModule
from flextron_lit.elastic import ElasticBackbone, importance
from flextron_lit.elastic.compensation import FORMS, Form
from flextron_lit.elastic.importance import Batch, Importance

Order = Literal[Importance, "greedy"]
ORDERS: tuple[Order, ...] = (*get_args(Importance), "greedy")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How the units of a dense network are put in order, and narrower widths reconstructed, before training."""

    tokens: int = 16384
    """Training tokens that run through the dense model; 0 leaves the network as it is."""
    domains: list[str] | None = None
    """Domains to take them from; None means all, by their mixing weights."""
    importance: Order = "greedy"
    """`greedy`: the unit first that explains most of what those before it leave (ours; with own projections alone);
    `magnitude` of the activation (paper), or `outgoing`: of what the unit adds, its outgoing weights included."""
    compensation: Form = "own"
    """What makes up for the units that a width leaves out: an `own` output projection for each width, by least squares
    (ours); `scales`, a factor for each unit and width, which takes no memory to speak of; or `none` (paper)."""
    excess_tokens: int = 8192
    """Training tokens of the one backward pass from which the excess loss of every block and width is computed, which
    answers budgets until there is a surrogate; 0 leaves that out."""
    written: float = 0.0
    """Share of both that the network writes itself, from random first tokens on: texts of few kinds fit the
    projections to those kinds, what it writes is of all that it has learned. Takes as long as `generate` does."""
    skips: float = 0.0
    """Share of the layers that may be skipped as a whole (width 0 in both blocks): those that the network does best
    without, measured one behind the other on `excess_tokens` (ours, in the order of SLEB; skipped_layers.py). Where a
    layer takes time beside its products, one less saves more than narrower ones do (configs/depth.yaml)."""
    balance_domains: bool = False
    """Let every domain count the same, however large its activations are."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"calibration.tokens must be 0 or more, not {self.tokens}")
        if self.excess_tokens < 0:
            raise ValueError(f"calibration.excess_tokens must be 0 or more, not {self.excess_tokens}")
        if not 0 <= self.skips < 1:
            raise ValueError(f"calibration.skips is a share of the layers, from 0 to below 1, not {self.skips}")
        if self.skips and not (self.tokens and self.excess_tokens):
            raise ValueError(
                f"calibration.skips is {self.skips}, but which layers to skip is measured on "
                "calibration.excess_tokens: set calibration.tokens and calibration.excess_tokens above 0"
            )
        if not 0 <= self.written < 1:
            raise ValueError(f"calibration.written is a share from 0 to below 1, not {self.written}")
        for name, known in (("importance", ORDERS), ("compensation", FORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        if self.importance == "greedy" and self.compensation != "own":
            raise ValueError(
                f"importance greedy counts on own projections, but compensation is {self.compensation}; take "
                "importance magnitude with it"
            )
        if self.domains is not None and not self.domains:
            raise ValueError("calibration.domains names no domain; null means all")


def falling_importance(
    backbone: ElasticBackbone, text: TextDataModule, calibration: Calibration, own: Sequence[Batch] = ()
) -> list[Tensor]:
    """Measure the full network on training text: unit indices by falling importance, one tensor [units] a block.

    Args:
        backbone: the dense network.
        text: to measure on.
        calibration: how.
        own: batches that the network has written itself, as if of one more domain.

    Raises:
        ValueError: if a domain does not exist, or there is too little text.
    """
    assert calibration.importance != "greedy"
    batches: list[list[Batch]] = [[*text.calibration_batches(*group)] for group in groups(text, calibration)]
    if own and calibration.balance_domains:
        batches.append([*own])
    else:
        batches[-1] += own
    measured = [importance.measure(backbone, each, calibration.importance) for each in batches]
    return importance.falling_order(importance.balanced(measured) if len(measured) > 1 else measured[0])


def groups(text: TextDataModule, calibration: Calibration) -> list[tuple[int, list[str]]]:
    """Tokens and domains that are measured together."""
    names = calibration.domains or text.domain_names
    together = [[name] for name in names] if calibration.balance_domains else [names]
    tokens = round(calibration.tokens * (1 - calibration.written))
    return [(-(-tokens // len(together)), group) for group in together]
