"""What `python main.py generate` made, and what there is to say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flextron_lit.generation.speculative import Speculated
from flextron_lit.latency.timing import Interleaved

COMPARED = "budget"
"""Name of what is compared with the full network."""


@dataclass(frozen=True)
class Generated:
    """An answer."""

    text: str
    tokens: int
    """How many were generated, the one that ends the text included."""
    seconds: float
    drafts: Speculated | None = None
    """How it came about, if its tokens were drafted first."""

    @property
    def speed(self) -> float:
        """Tokens a second, the pass over the prompt included."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Drafted:
    """What proposed an answer's tokens."""

    budget: str
    how: str
    costs: Mapping[str, float]
    """Relative to the full network."""
    made: Speculated


@dataclass(frozen=True)
class Report:
    """An answer, and what there is to say of it."""

    budget: str | None
    how: str
    spent: Mapping[str, float]
    """Costs relative to the full network."""
    prompt_tokens: int
    made: Generated
    draft: Drafted | None
    timed: Interleaved[str] | None
    """Of a comparison with the full network."""

    def to_json(self) -> dict[str, Any]:
        """All of it, for scripts."""
        made, draft, timed = self.made, self.draft, self.timed
        found: dict[str, Any] = {
            "text": made.text,
            "budget": self.budget,
            "how": self.how,
            "costs": dict(self.spent),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": made.tokens,
            "seconds": made.seconds,
            "tokens_per_second": made.speed,
        }
        if draft is not None:
            found["speculative"] = {
                "budget": draft.budget,
                "how": draft.how,
                "costs": dict(draft.costs),
                "drafted": draft.made.drafted,
                "accepted": draft.made.accepted,
                "acceptance": draft.made.acceptance,
                "passes": draft.made.passes,
                "tokens_per_pass": made.tokens / draft.made.passes,
            }
        if timed is not None:
            ratio = timed.ratios[COMPARED]
            found |= {"time_ratio": ratio.value, "spread": ratio.spread, "full_seconds": timed.reference}
        return found

    def lines(self) -> Iterator[str]:
        """All but the text, for people."""
        asked = "" if self.budget is None else f"budget {self.budget}: "
        yield asked + _told(self.how, self.spent)
        made, draft = self.made, self.draft
        if draft is not None:
            yield f"drafts within {draft.budget}: {_told(draft.how, draft.costs)}"
            yield (
                f"drafted tokens: {draft.made.drafted}, {draft.made.accepted} accepted ({draft.made.acceptance:.0%}); "
                f"{made.tokens / draft.made.passes:.2f} tokens a pass of what decides"
            )
        speed = f"{made.tokens} new in {made.seconds:.2f} s ({made.speed:.1f}/s)"
        yield f"tokens: {self.prompt_tokens} of the prompt, {speed}"
        if self.timed is not None:
            ratio, full = self.timed.ratios[COMPARED], made.tokens / self.timed.reference
            yield (
                f"{made.tokens} tokens take {ratio.value:.3f} ± {ratio.spread:.3f} of the full network's time: "
                f"{full / ratio.value:.1f}/s, the full network {full:.1f}/s"
            )


def _told(how: str, costs: Mapping[str, float]) -> str:
    return "; ".join([how, *(f"{ratio:.3f} of the full network's {name}" for name, ratio in costs.items())])
