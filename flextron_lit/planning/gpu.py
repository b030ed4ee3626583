"""The GPU that a plan is for, and how long it computes."""

from dataclasses import dataclass, fields

SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What a data sheet says of a GPU, and how much of it a run gets; the defaults are an H100's."""

    memory_gb: float = 80.0
    """10^9 bytes."""
    usable_share: float = 0.9
    """Of the memory; CUDA, NCCL and what lies unused between tensors take the rest."""
    peak_tflops: float = 989.0
    """10^12 FLOPs a second of matrix products, dense, in the type that they run in."""
    share_of_peak: float = 0.4
    """Of those, over the run: a guess; measure some steps to know."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value <= 0 or (field.name.startswith(("share", "usable")) and value > 1):
                limit = "above 0 and at most 1" if value > 1 else "above 0"
                raise ValueError(f"{field.name} must be {limit}, not {value}")

    @property
    def usable_bytes(self) -> float:
        """What tensors may take."""
        return self.memory_gb * 1e9 * self.usable_share

    def hours(self, flops: float) -> float:
        """Of one GPU, for so many FLOPs."""
        return flops / (self.peak_tflops * 1e12 * self.share_of_peak) / SECONDS
