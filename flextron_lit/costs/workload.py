"""What a deployed model is asked to do: costs and latencies are those of one workload."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

Phase = Literal["prefill", "decode"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One request, or a batch of requests of the same shape: a prompt goes in, generated tokens come out."""

    batch_size: int = 1
    """Sequences at once."""
    prompt_tokens: int = 256
    """Tokens of each prompt: one pass over all of them (prefill), of which only the last position gives logits."""
    generated_tokens: int = 64
    """Tokens generated after it: the first comes from the prefill, each other from a pass over one token (decode)."""
    dtype: Dtype = "float32"
    """Of weights and activations."""
    threads: int | None = None
    """Threads on a CPU; None means as many as torch takes by itself."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.prompt_tokens, self.generated_tokens) < 1:
            raise ValueError(
                "batch_size, prompt_tokens and generated_tokens must be 1 or more, not "
                f"{self.batch_size}, {self.prompt_tokens}, {self.generated_tokens}"
            )
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"dtype is one of {', '.join(get_args(Dtype))}, not {self.dtype!r}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, not {self.threads}")

    @property
    def decode_steps(self) -> int:
        """Passes over one token."""
        return self.generated_tokens - 1

    @property
    def decode_context(self) -> float:
        """Tokens that a decode step attends to, itself included, on average over the steps."""
        return self.prompt_tokens + self.generated_tokens / 2

    @property
    def total_tokens(self) -> int:
        """Tokens of a sequence that the KV cache holds at the end: the last one generated is never fed back."""
        return self.prompt_tokens + self.generated_tokens - 1

    def tokens(self, phase: Phase) -> int:
        """Of each sequence, that a pass of a kind takes in."""
        return self.prompt_tokens if phase == "prefill" else 1

    @property
    def phases(self) -> dict[Phase, int]:
        """The kinds of pass that a request takes, with how many of each."""
        counts: dict[Phase, int] = {"prefill": 1, "decode": self.decode_steps}
        return {phase: count for phase, count in counts.items() if count}

    def of_request(self, times: Mapping[Phase, float], shares: Mapping[Phase, float]) -> float:
        """Shares of what passes take, as one share of what the whole request takes.

        Args:
            times: of a pass of each kind, in any unit.
            shares: of those times.
        """
        taken = {phase: count * times[phase] for phase, count in self.phases.items()}
        return sum(time * shares[phase] for phase, time in taken.items()) / sum(taken.values())

    @property
    def name(self) -> str:
        """A known name, or the numbers; for files."""
        shape = replace(self, dtype="float32", threads=None)
        known = next((name for name, workload in WORKLOADS.items() if workload == shape), None)
        return known or f"{self.batch_size}x{self.prompt_tokens}+{self.generated_tokens}"


WORKLOADS: dict[str, Workload] = {
    "chat": Workload(batch_size=1, prompt_tokens=256, generated_tokens=64),
    "document": Workload(batch_size=1, prompt_tokens=1024, generated_tokens=64),
    "batch-scoring": Workload(batch_size=8, prompt_tokens=256, generated_tokens=1),
}
"""Common ones by name."""


def named(name: str, **changes: Any) -> Workload:
    """A common workload with some of its numbers changed.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in WORKLOADS:
        raise ValueError(f"there is no workload {name!r}; there are {', '.join(WORKLOADS)}")
    return replace(WORKLOADS[name], **changes)
