"""What a deployed model is asked to do: costs and latencies are those of one workload."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One request, or a batch of requests of the same shape: a prompt goes in, generated tokens come out."""

    batch_size: int = 1
    """Sequences at once."""
    prompt_tokens: int = 256
    """Tokens of each prompt: one pass over all of them (prefill), of which only the last position gives logits."""
    generated_tokens: int = 64
    """Tokens generated after it: the first comes from the prefill, each other from a pass over one token (decode)."""

    def __post_init__(self) -> None:
        if min(self.batch_size, self.prompt_tokens, self.generated_tokens) < 1:
            raise ValueError(
                "batch_size, prompt_tokens and generated_tokens must be 1 or more, not "
                f"{self.batch_size}, {self.prompt_tokens}, {self.generated_tokens}"
            )

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
