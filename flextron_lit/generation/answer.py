"""What there is to say of what `python main.py generate` made."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flextron_lit.generation.call import COMPARED, Chosen, Generated
from flextron_lit.latency.miss import told
from flextron_lit.latency.timing import Interleaved


@dataclass(frozen=True)
class Report:
    """An answer, and what there is to say of it."""

    choice: Chosen
    """What decided on its tokens."""
    spent: Mapping[str, float]
    """Costs relative to the full network."""
    prompt_tokens: int
    made: Generated
    draft: Chosen | None
    """What proposed them, if something did."""
    timed: Interleaved[str] | None
    """Of a comparison with the full network."""

    def to_json(self) -> dict[str, Any]:
        """All of it, for scripts."""
        made, draft, timed = self.made, self.draft, self.timed
        found: dict[str, Any] = {
            "text": made.text,
            "budget": self.choice.budget,
            "how": self.choice.how,
            "costs": dict(self.spent),
            "may_miss": dict(self.choice.may_miss),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": made.tokens,
            "seconds": made.seconds,
            "tokens_per_second": made.speed,
        }
        if draft is not None and made.drafts is not None:
            found["speculative"] = {
                "budget": draft.budget,
                "how": draft.how,
                "costs": dict(draft.ratios),
                "may_miss": dict(draft.may_miss),
                "drafted": made.drafts.drafted,
                "accepted": made.drafts.accepted,
                "acceptance": made.drafts.acceptance,
                "passes": made.drafts.passes,
                "tokens_per_pass": made.tokens / made.drafts.passes,
            }
        if timed is not None:
            ratio = timed.ratios[COMPARED]
            found |= {"time_ratio": ratio.value, "spread": ratio.spread, "full_seconds": timed.reference}
        return found

    def lines(self) -> Iterator[str]:
        """All but the text, for people."""
        choice, made, draft = self.choice, self.made, self.draft
        asked = "" if choice.budget is None else f"budget {choice.budget}: "
        yield asked + _told(choice.how, self.spent) + _may_miss(choice)
        if draft is not None and made.drafts is not None:
            drafts = made.drafts
            yield f"drafts within {draft.budget}: {_told(draft.how, draft.ratios)}{_may_miss(draft)}"
            yield (
                f"drafted tokens: {drafts.drafted}, {drafts.accepted} accepted ({drafts.acceptance:.0%}); "
                f"{made.tokens / drafts.passes:.2f} tokens a pass of what decides"
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


def _may_miss(choice: Chosen) -> str:
    said = told(choice.may_miss)
    return said and f"; {said}"
