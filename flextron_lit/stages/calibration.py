"""How the units of a dense network are sorted before training."""

from dataclasses import dataclass

from torch import Tensor

from flextron_lit.data import TextDataModule
from flextron_lit.elastic import ElasticBackbone, importance
from flextron_lit.elastic.importance import Importance


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How unit importance is measured before training."""

    tokens: int = 8192
    """Training tokens that run through the dense model; 0 leaves the units unsorted."""
    domains: list[str] | None = None
    """Domains to take them from; None means all, by their mixing weights."""
    importance: Importance = "magnitude"
    """`magnitude` of the activation (paper), or `outgoing`: of what the unit adds, its outgoing weights included."""
    balance_domains: bool = False
    """Let every domain count the same, however large its activations are."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise ValueError(f"calibration.tokens must be 0 or more, not {self.tokens}")
        if self.importance not in importance.SCORES:
            raise ValueError(f"importance is one of {', '.join(importance.SCORES)}, not {self.importance!r}")
        if self.domains is not None and not self.domains:
            raise ValueError("calibration.domains names no domain; null means all")


def falling_importance(backbone: ElasticBackbone, text: TextDataModule, calibration: Calibration) -> list[Tensor]:
    """Measure the full network on training text: unit indices by falling importance, one tensor [units] a block.

    Raises:
        ValueError: if a domain does not exist, or there is too little text.
    """
    names = calibration.domains or text.domain_names
    groups: list[list[str]] = [[name] for name in names] if calibration.balance_domains else [names]
    tokens = -(-calibration.tokens // len(groups))
    batches = (text.calibration_batches(tokens, group) for group in groups)
    measured = [importance.measure(backbone, each, calibration.importance) for each in batches]
    return importance.falling_order(importance.balanced(measured) if len(measured) > 1 else measured[0])
