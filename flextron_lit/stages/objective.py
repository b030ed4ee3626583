"""What elastic training minimises: weights of the full network and of the distillation terms."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class FullWeight:
    """Weight of the full network's loss beside a sampled sub-network's 1; linear over the run, never 0.

    Ours; that more weight late helps the largest network is Nemotron Elastic's finding.
    """

    start: float = 1.0
    """At the first step."""
    end: float = 1.0
    """At the last step."""

    def __post_init__(self) -> None:
        if min(self.start, self.end) <= 0:
            raise ValueError(
                f"full_weight must be above 0 (the full network always trains), not {self.start} to {self.end}"
            )

    @property
    def constant(self) -> bool:
        """Whether it stays the same over the run."""
        return self.start == self.end

    def at(self, progress: float) -> float:
        """The weight at a share of the run, 0 to 1."""
        return self.start + (self.end - self.start) * min(max(progress, 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """Weights of the KL terms (ours; the paper trains on the language loss alone). 0 leaves a term out.

    The frozen original costs a second copy of the weights in memory and one more forward pass a step.
    """

    sampled_from_full: float = 0.0
    """Sampled sub-networks towards the full network's detached logits (Once-for-All, in place)."""
    sampled_from_original: float = 0.0
    """Sampled sub-networks towards the frozen original (Minitron)."""
    full_from_original: float = 0.0
    """The full network towards the frozen original: guards what it could do before."""
    language: float = 1.0
    """Weight of the sampled sub-networks' language loss; 0 trains them by distillation alone."""
    temperature: float = 1.0
    """Of both sides' softmax; the terms are scaled by its square (Hinton et al. 2015)."""

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0 or self.temperature == 0:
            raise ValueError(f"distillation weights must be 0 or more and the temperature above 0, not {asdict(self)}")
        if not (self.language or self.sampled_from_full or self.sampled_from_original):
            raise ValueError("distillation.language is 0 and nothing else trains the sampled sub-networks; set one")
        if self.temperature != 1 and not (self.sampled_from_full or self.from_original):
            raise ValueError(f"distillation.temperature {self.temperature} has no effect without a distillation weight")

    @property
    def from_original(self) -> bool:
        """Whether the frozen original is needed."""
        return bool(self.sampled_from_original or self.full_from_original)
