"""Self-speculative decoding: a sub-network drafts tokens, the full network reads them in one pass (ours).

Both are selections of one elastic network, so that nothing is copied; each has a KV cache of its own. Without sampling
the text is that of the full network alone; with sampling it has its distribution (Leviathan et al., ICML 2023,
algorithm 1).

Hugging Face's own assisted generation wants a second model to draft, runs a whole `generate` for each draft, and begins
it by reading two tokens. Two take a CPU half as long again as one, and tokens with widths of their own are sorted where
one alone is not. So the loop is ours, inside Hugging Face's `generate`, which makes everything else: lengths,
processors, criteria.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from flextron_lit.elastic import ElasticBackbone
from flextron_lit.elastic.generate_arguments import ended
from flextron_lit.elastic.kv_cache import retract, retractable
from flextron_lit.elastic.positions import demand_positions
from flextron_lit.elastic.selection import Selection

Process = Callable[[Tensor, Tensor], Tensor]
"""(tokens [1, T], logits behind them [1, V]) to logits [1, V], as Hugging Face's logits processors."""
Criteria = Callable[[Tensor, None], Tensor]
"""Tokens [1, T] to whether to stop behind them, bool [1], as Hugging Face's stopping criteria."""
DRAFT_TOKENS = 8
CONFIDENCE = 0.4
"""The better of 0, 0.4 and 0.7 in the first trial (benchmarks/speculative.py)."""
UNHEARD = ("assistant_model", "position_ids", "tokenizer")
"""Arguments of `generate` that never reach a decoding loop handed to it, or are made anew by it."""
HEARD = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
"""What the loop is told of the model's inputs."""


@dataclass(frozen=True)
class Speculated:
    """What was generated, and how much of it was drafted."""

    tokens: Tensor
    """Prompt and answer, int64 [1, T]."""
    drafted: int
    """Tokens that the draft proposed."""
    accepted: int
    """Those of them that became part of the answer."""
    passes: int
    """Of the verifier; each adds one token to those that it accepts."""

    @property
    def acceptance(self) -> float:
        """Share of the proposed tokens that became part of the answer; 0 if none was proposed."""
        return self.accepted / max(self.drafted, 1)


def speculate(
    backbone: ElasticBackbone,
    input_ids: Tensor,
    *,
    draft: Selection,
    verifier: Selection | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    confidence: float = CONFIDENCE,
    streamer: BaseStreamer | None = None,
    **settings: Any,
) -> Speculated:
    """Generate what the verifier would generate alone, in fewer of its passes.

    In fp32 the tokens of greedy decoding are the same, but where two logits are within rounding of each other: a pass
    over several tokens rounds otherwise than one over one.

    Args:
        backbone: the elastic network.
        input_ids: the prompt without padding, int64 [1, T].
        draft: what proposes tokens: a sub-network, or a policy.
        verifier: what decides; None means the full network.
        draft_tokens: most tokens to propose before each of the verifier's passes.
        confidence: a token that the draft gives a lower probability is the last that it proposes for a pass, since the
            next would hardly be accepted; 0 always proposes `draft_tokens`.
        streamer: told the prompt, then the tokens of each of the verifier's passes.
        settings: of Hugging Face's `generate`, for greedy decoding or sampling: `max_new_tokens`, `eos_token_id`,
            `do_sample`, `temperature`, `stopping_criteria`...

    Raises:
        ValueError: for more than one sequence, padding, no draft tokens, a confidence that is no probability, more
            tokens than the model has positions, or a setting that has no effect here.
    """
    with ended(streamer):
        _check_asked(input_ids, draft_tokens, confidence, settings)
        verifier = backbone.space.full() if verifier is None else verifier
        loop = _Loop(backbone, draft, verifier, draft_tokens, confidence, streamer)
        prompt = input_ids.to(backbone.model.device)
        # a mask told apart from none: without one, `generate` takes tokens that look like padding for padding
        settings.setdefault("attention_mask", torch.ones_like(prompt))
        with backbone.selection.call(verifier):
            tokens = cast(Any, backbone.model).generate(prompt, custom_generate=loop, **settings)
    return Speculated(tokens, loop.drafted, loop.accepted, loop.passes)


def agreed(drafted: Tensor, verifier: Tensor) -> Tensor:
    """Greedy acceptance: the drafted tokens up to the first that the verifier would not have taken, then its own.

    Args:
        drafted: int64 [k].
        verifier: logits before each drafted token and after the last, [k + 1, V].

    Returns:
        1 to k + 1 tokens.
    """
    best = verifier.argmax(-1)
    return best[: _leading(best[:-1] == drafted) + 1]


def sampled(drafted: Tensor, draft: Tensor, verifier: Tensor) -> Tensor:
    """Acceptance by chance, so that the tokens are distributed as the verifier's (Leviathan et al., algorithm 1).

    Args:
        drafted: drawn from the draft's probabilities, int64 [k].
        draft: those probabilities, [k, V].
        verifier: probabilities before each drafted token and after the last, [k + 1, V].

    Returns:
        1 to k + 1 tokens.
    """
    rows = torch.arange(len(drafted), device=drafted.device)
    odds = verifier[rows, drafted] / draft[rows, drafted]
    count = _leading(torch.rand_like(odds) < odds)
    rest = verifier[count]
    if count < len(drafted):
        missing = (rest - draft[count]).clamp(min=0)
        # a rejection that only rounding allows leaves nothing that the draft proposes too rarely
        rest = missing if missing.any() else rest
    return torch.cat([drafted[:count], torch.multinomial(rest, 1)])


def _leading(true: Tensor) -> int:
    """How many are true before the first that is not."""
    return int(true.long().cumprod(0).sum())


@dataclass(frozen=True)
class _Reader:
    """A selection, and the keys and values of the tokens that it has read."""

    backbone: ElasticBackbone
    selection: Selection
    cache: DynamicCache
    """That can forget."""

    def logits(self, tokens: Tensor, last: int) -> Tensor:
        """Read what is new of the tokens [1, T]: logits of the last few of them, float32 [last, V]."""
        new = tokens[:, self.cache.get_seq_length() :]
        with self.backbone.selection.call(self.selection):
            read = self.backbone.model(new, past_key_values=self.cache, use_cache=True, logits_to_keep=last)
        logits: Tensor = read.logits[0].float()
        return logits

    def keep(self, tokens: int) -> None:
        """Forget all but so many tokens."""
        retract(self.cache, max(self.cache.get_seq_length() - tokens, 0))


@dataclass
class _Loop:
    """The decoding loop that `generate` calls; the arguments are those of `speculate`, and what it counts."""

    backbone: ElasticBackbone
    draft: Selection
    verifier: Selection
    draft_tokens: int
    confidence: float
    streamer: BaseStreamer | None
    """`generate` keeps its own from a loop handed to it."""
    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Process,
        stopping_criteria: Criteria,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor:
        """Prompt [1, T] to prompt and answer.

        Raises:
            ValueError: if it is asked for what it does not do.
        """
        _check(model, generation_config, inputs)
        draft = _Reader(self.backbone, self.draft, retractable(DynamicCache(config=model.config)))
        verifier = _Reader(self.backbone, self.verifier, retractable(inputs["past_key_values"]))
        chooser = _Chooser(logits_processor, self.confidence, sampling=bool(generation_config.do_sample))
        tokens, done = input_ids, False
        self._tell(tokens)
        while not done:
            # the verifier adds a token of its own
            room = generation_config.max_length - tokens.shape[1] - 1
            drafted, probabilities = chooser.propose(draft, tokens, min(self.draft_tokens, room))
            taken = chooser.decide(verifier, tokens, drafted, probabilities)
            before = tokens.shape[1]
            tokens, done = _append(tokens, taken, stopping_criteria)
            self.drafted += len(drafted)
            # the last one taken is the verifier's own, unless a criterion stopped before it
            self.accepted += min(tokens.shape[1] - before, len(taken) - 1)
            self.passes += 1
            self._tell(tokens[:, before:])
            for reader in (draft, verifier):
                # the last token is still to be read
                reader.keep(tokens.shape[1] - 1)
        if self.streamer is not None:
            self.streamer.end()
        return tokens

    def _tell(self, tokens: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(tokens.cpu())


@dataclass(frozen=True)
class _Chooser:
    """How tokens are chosen: some are proposed, then decided on."""

    process: Process
    """What `generate` does to logits, such as a temperature."""
    confidence: float
    """Least probability of a proposed token for another to be proposed behind it."""
    _: KW_ONLY
    sampling: bool
    """Whether tokens are drawn, or the likeliest taken."""

    def propose(self, draft: _Reader, tokens: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Draft tokens behind those of [1, T]: int64 [k], and the probabilities that each was taken by, [k, V]."""
        behind, rows = tokens, []
        for _ in range(most):
            row = self._logits(draft, behind, 1).softmax(-1)
            token = torch.multinomial(row, 1) if self.sampling else row.argmax(-1, keepdim=True)
            behind = torch.cat([behind, token], -1)
            rows.append(row)
            # it stays, so that whether a token is proposed never depends on which one it is
            if float(row[0, token]) < self.confidence:
                break
        return behind[0, tokens.shape[1] :], torch.cat(rows) if rows else torch.empty(0, 1, device=tokens.device)

    def decide(self, verifier: _Reader, tokens: Tensor, drafted: Tensor, probabilities: Tensor) -> Tensor:
        """What to take behind the tokens [1, T], after the verifier has read the drafted ones: 1 to k + 1 tokens."""
        logits = self._logits(verifier, torch.cat([tokens, drafted[None]], -1), len(drafted) + 1)
        return sampled(drafted, probabilities, logits.softmax(-1)) if self.sampling else agreed(drafted, logits)

    def _logits(self, reader: _Reader, tokens: Tensor, last: int) -> Tensor:
        """Processed logits behind the last few of the tokens [1, T], [last, V]."""
        first = tokens.shape[1] - last + 1
        rows = [self.process(tokens[:, : first + i], row[None]) for i, row in enumerate(reader.logits(tokens, last))]
        return torch.cat(rows)


def _append(tokens: Tensor, taken: Tensor, criteria: Criteria) -> tuple[Tensor, bool]:
    """Tokens [1, T] with those taken behind them up to the first that a criterion stops at, and whether one did."""
    for token in taken:
        tokens = torch.cat([tokens, token.view(1, 1)], -1)
        if bool(criteria(tokens, None).all()):
            return tokens, True
    return tokens, False


def _check_asked(input_ids: Tensor, draft_tokens: int, confidence: float, settings: Mapping[str, Any]) -> None:
    if input_ids.shape[0] != 1:
        raise ValueError(f"speculative decoding takes 1 sequence, not {input_ids.shape[0]}; give one after the other")
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens must be 1 or more, not {draft_tokens}")
    if not 0 <= confidence <= 1:
        raise ValueError(f"confidence must be from 0 to 1, not {confidence}")
    for name in UNHEARD:
        if name in settings:
            raise ValueError(f"{name} has no effect on speculative decoding; leave it out")


def _check(model: PreTrainedModel, config: GenerationConfig, inputs: dict[str, Any]) -> None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(f"speculative decoding is greedy or samples; its settings ask for {mode.value}")
    if config.num_return_sequences != 1 or config.return_dict_in_generate:
        raise ValueError("speculative decoding gives one sequence of tokens, without scores or other outputs")
    if not isinstance(inputs.get("past_key_values"), DynamicCache):
        raise ValueError("speculative decoding needs a dynamic KV cache; leave use_cache and cache_implementation out")
    if inputs["attention_mask"] is not None:
        raise ValueError("speculative decoding takes one sequence without padding; leave the padding out")
    unheard = inputs.keys() - HEARD
    if unheard:
        raise ValueError(f"{', '.join(sorted(unheard))} has no effect on speculative decoding; leave it out")
    remedy = "lower max_new_tokens or shorten the prompt"
    demand_positions(model.config, config.max_length, "prompt plus answer", remedy)
