"""Budgets by phase: of one generation each part has a sub-network of its own, on one KV cache (ours).

A token is read by the sub-network of its phase: what it asks of the past, what its MLPs compute, and so the token
behind it. What is kept of it are the keys and values of all KV groups in all layers, also where its own sub-network has
fewer or skips the attention, as for tokens with widths of their own (`families/attention.py`). So a wider phase behind
a narrower one finds all that it reads, and a generation with the cache equals one without. The price: a narrower phase
saves time, and no memory of the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from flextron_lit.elastic.selection import Policy
from flextron_lit.space import SubNetwork

PHASES = ("prompt", "think", "answer")
"""In their order: `think` is what is generated until the switch has been, `answer` what is generated otherwise."""
PROMPT, THINK, ANSWER = range(3)


@dataclass(frozen=True)
class Schedule:
    """Which sub-network reads the tokens of each phase."""

    sub_networks: tuple[SubNetwork, SubNetwork, SubNetwork]
    """In the order of `PHASES`."""
    switch: tuple[int, ...] = ()
    """Tokens behind which thinking is over, themselves read by the answer's sub-network from the last of them on; none
    if there is no thinking."""

    def phases(self, tokens: Tensor, prompt_tokens: int) -> Tensor:
        """The phase of every token, as its place in `PHASES`: int64 [B, T] to int64 [B, T].

        Args:
            tokens: prompts, padded on the left, and what has been generated.
            prompt_tokens: how many columns are the prompts'; a switch that stands in them is none.
        """
        found = torch.full_like(tokens, ANSWER)
        found[:, :prompt_tokens] = PROMPT
        made, length = tokens[:, prompt_tokens:], len(self.switch)
        if not length:
            return found
        over = torch.zeros_like(made, dtype=torch.bool)
        if made.shape[1] >= length:
            ends = (made.unfold(1, length, 1) == made.new_tensor(self.switch)).all(-1)
            over = F.pad(ends, (length - 1, 0)).long().cumsum(1) > 0
        found[:, prompt_tokens:].masked_fill_(~over, THINK)
        return found


class PhasePolicy(Policy):
    """Chooses for every token by its phase; it is told the tokens as they are generated.

    Until then all that is read is the prompt.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._choices = torch.tensor([each.choices for each in schedule.sub_networks])
        self._prompt_tokens: int | None = None
        self._phases: Tensor | None = None

    def hear(self, tokens: Tensor, prompt_tokens: int | None = None) -> None:
        """Take note of all tokens so far, the one to be read next included, [B, T].

        Args:
            tokens: prompts and answers.
            prompt_tokens: of them; None the first time means all but the last.
        """
        if prompt_tokens is not None or self._prompt_tokens is None:
            self._prompt_tokens = tokens.shape[1] - 1 if prompt_tokens is None else prompt_tokens
        self._phases = self.schedule.phases(tokens, self._prompt_tokens)

    def choose(self, block: int, hidden_states: Tensor) -> Tensor:
        """Choice index of every token, [B, T]: a pass reads the last that were heard of."""
        batch, tokens = hidden_states.shape[:2]
        choices = self._choices[:, block].to(hidden_states.device)
        if self._phases is None:
            return choices[PROMPT].expand(batch, tokens)
        return choices[self._phases[:, -tokens:]]

    def told(self, given: Mapping[str, Any], own: GenerationConfig) -> dict[str, Any]:
        """Arguments of Hugging Face's `generate`, by name, with which it tells the tokens as they are generated.

        Args:
            given: the arguments.
            own: what the model's files say of generating.

        Raises:
            ValueError: if they ask for more than greedy decoding or sampling.
        """
        _refuse_modes(own, given)
        # before other criteria, which may run the network themselves
        criteria = [_Listener(self), *(given.get("stopping_criteria") or ())]
        return {**given, "stopping_criteria": StoppingCriteriaList(criteria)}


class _Listener(StoppingCriteria):
    """What `generate` asks after every token."""

    def __init__(self, policy: PhasePolicy) -> None:
        self.policy = policy

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.policy.hear(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def phase_policy(
    budgets: Any,
    switch: str | Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    answer: Callable[[Any], SubNetwork],
) -> PhasePolicy:
    """The policy for budgets by phase; a phase that is not named has that of the phase behind it.

    Args:
        budgets: by the names of `PHASES`; the answer has one.
        switch: what ends thinking, where that has a budget.
        tokenizer: makes tokens of a switch that is a text.
        answer: from a budget to a sub-network.

    Raises:
        ValueError: if a name is none of a phase, the answer has no budget, or thinking has no end.
    """
    named = budgets if isinstance(budgets, Mapping) else {}
    unknown = [name for name in named if name not in PHASES]
    tokens = () if unknown else _switch_of(named, switch, tokenizer)
    if unknown or "answer" not in named:
        what = f"{unknown[0]!r} is no phase" if unknown else "the answer has no budget"
        raise ValueError(f"{what}; budgets by phase are of {', '.join(PHASES)}: {{'prompt': 1.0, 'answer': 0.7}}")
    # an answer may take a search: one for each budget that is given
    found = {name: answer(budget) for name, budget in named.items()}
    behind = found.get("think", found["answer"])
    return PhasePolicy(Schedule((found.get("prompt", behind), behind, found["answer"]), tokens))


def _switch_of(
    budgets: Mapping[str, Any], switch: str | Sequence[int] | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    """The tokens that end thinking; of a text those that the tokenizer makes of it by itself."""
    if ("think" in budgets) != (switch is not None):
        raise ValueError(
            "a budget for 'think' holds until a switch is generated, and a switch has no effect without one: "
            "generate(..., budget={'think': 0.6, 'answer': 1.0}, switch='</think>')"
        )
    if switch is None:
        return ()
    found = tokenizer(switch, add_special_tokens=False)["input_ids"] if isinstance(switch, str) else switch
    if not len(found):
        raise ValueError(f"the switch {switch!r} has no tokens, so that it would never be generated")
    return tuple(int(token) for token in found)


def _refuse_modes(own: GenerationConfig, given: Mapping[str, Any]) -> None:
    """Refuse ways of generating that read tokens and take them back: their phase would not be known in time."""
    config = GenerationConfig.from_dict((given.get("generation_config") or own).to_dict())
    config.update(**{name: value for name, value in given.items() if hasattr(config, name)})
    mode = config.get_generation_mode(given.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or given.get("custom_generate") is not None:
        what = "custom_generate" if given.get("custom_generate") is not None else mode.value
        raise ValueError(f"budgets by phase are for greedy decoding or sampling, not for {what}; leave one out")
