"""One call of generate within a budget: what it gets, what it takes, and the same against the full network."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import ge
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from flextron_lit.elastic.selection import Selection
from flextron_lit.generation.own_settings import ends_alone
from flextron_lit.generation.prompt import Inputs
from flextron_lit.generation.speculative import Speculated, speculate
from flextron_lit.latency.latency_table import origin_of
from flextron_lit.latency.timing import Interleaved, interleaved, timed
from flextron_lit.model import FlextronModel
from flextron_lit.routers.dynamic import DynamicPolicy, mean_ratio
from flextron_lit.space import SubNetwork

COMPARED = "budget"
"""Name of what is compared with the full network."""
ROUNDS = 2
"""Of a comparison: in each the full network runs before and after."""
Drafting = Mapping[str, Any]
"""`draft` and `draft_tokens` of `speculate`."""


@contextmanager
def notes_told(say: Callable[[str], None]) -> Iterator[None]:
    """Tell what is warned of meanwhile, such as a stale router, in a line each."""
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        yield
    # the same router may answer twice
    for note in dict.fromkeys(str(note.message) for note in notes):
        say(f"note: {note}")


@dataclass(frozen=True)
class Chosen:
    """What a budget gets."""

    selection: Selection
    how: str
    ratios: Mapping[str, float]
    """What it costs, relative to the full network, by the names of the budget's costs; empty for a dynamic router."""
    budget: str | None = None
    """As a user wrote it, where one did."""
    may_miss: Mapping[str, float] = field(default_factory=dict)
    """By how much the budget's latencies may miss their table, by name, as a share of the full network's."""

    def spent(self) -> Mapping[str, float]:
        """The ratios; of a dynamic router the mean over all tokens read since it was last asked, the prompt's included.

        Drafted tokens are read too, also those that it refuses.
        """
        if isinstance(self.selection, DynamicPolicy):
            table = self.selection.table
            return {table.name: mean_ratio(self.selection.take(), table)}
        return self.ratios


@dataclass(frozen=True)
class Generated:
    """A text, and how it was made."""

    text: str
    tokens: int
    """How many were generated, the one that ends the text included."""
    seconds: float
    """Without compiling, which is done once."""
    drafts: Speculated | None = None
    """How it came about, if its tokens were drafted first."""

    @property
    def speed(self) -> float:
        """Tokens a second, the pass over the prompt included."""
        return self.tokens / self.seconds


def settings_for(
    tokenizer: PreTrainedTokenizerBase, most: int, temperature: float | None = None, top_p: float | None = None
) -> dict[str, Any]:
    """What Hugging Face's `generate` is told: of each token, and of the end.

    Args:
        tokenizer: the token that ends a text pads too, where there is none to pad.
        most: tokens.
        temperature: as asked for, whatever the model's files say; without it and `top_p` the likeliest token is taken.
        top_p: likewise.
    """
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    likeliest = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    drawn = {"do_sample": True, "temperature": temperature or 1.0, "top_p": top_p or 1.0, "top_k": 0}
    choice = likeliest if temperature is None and top_p is None else drawn
    return {**choice, "max_new_tokens": most, "pad_token_id": pad}


def chosen(model: FlextronModel, budget: str | None, *, dynamic: bool, latency: str | None) -> Chosen:
    """What a budget gets; None gets the full network.

    Raises:
        ValueError: if the budget cannot be read or met, or the checkpoint has nothing to answer it with.
    """
    loaded = model.flextron
    if budget is None:
        return Chosen(model.backbone.space.full(), "the full network", {})
    if dynamic:
        selection = loaded.dynamic_routing.answer(budget, model.backbone)
        if isinstance(selection, DynamicPolicy):
            name = selection.table.name
            measured = origin_of(loaded.folder, model.backbone.space, selection.table)
            may_miss = {key: miss for key, miss in (measured[1].may_miss if measured else {}).items() if key == name}
            return Chosen(selection, f"the dynamic router for {name}", {}, budget, may_miss)
        return Chosen(selection, "the full network meets it", {}, budget)
    answer = loaded.answer(budget, latency)
    tables = (limit.table for limit in loaded.routing(latency).parse(budget))
    ratios = {table.name: table.ratio(answer.sub_network) for table in tables}
    return Chosen(answer.sub_network, answer.how, ratios, budget, answer.may_miss)


def drafter(model: FlextronModel, budget: str, decides: Selection, *, latency: str | None) -> Chosen:
    """What drafts within a budget: always a sub-network, so that its tokens need no routing.

    Raises:
        ValueError: as `chosen`, or if it has no block narrower than the sub-network that decides.
    """
    choice = chosen(model, budget, dynamic=False, latency=latency)
    draft, widest = choice.selection, decides if isinstance(decides, SubNetwork) else model.backbone.space.full()
    assert isinstance(draft, SubNetwork)
    if all(map(ge, draft.choices, widest.choices)):
        raise ValueError(
            f"--speculative {budget} drafts by a sub-network that is nowhere narrower than what decides, which gains "
            "nothing; give it less"
        )
    return choice


def generate(
    model: FlextronModel,
    inputs: Inputs,
    selection: Selection,
    settings: Mapping[str, Any],
    streamer: TextStreamer | None = None,
    drafting: Drafting | None = None,
) -> Generated:
    """Generate within a selection; the streamer tells each word as it comes.

    Args:
        model: the network; of its own settings it keeps what ends a text, see `ends_alone`.
        inputs: of one prompt, [1, T].
        selection: what is active, or decides on what is drafted.
        settings: of Hugging Face's `generate`.
        streamer: None tells nothing.
        drafting: what proposes tokens; None generates without.
    """

    def run() -> tuple[Tensor, Speculated | None]:
        with ends_alone(model) as ends:
            if drafting is None:
                with model.use(selection):
                    return model.generate(**inputs, **settings, **ends, streamer=streamer), None
            by = {**settings, **ends, **drafting, "verifier": selection, "streamer": streamer}
            made = speculate(model.backbone, **inputs, **by)
            return made.tokens, made

    before = _compiling(model)
    (tokens, drafts), seconds = timed(run, model.device)
    seconds -= _compiling(model) - before
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return Generated(str(model.tokenizer.decode(new, skip_special_tokens=True)), len(new), seconds, drafts)


def _compiling(model: FlextronModel) -> float:
    """Seconds that compiling has taken so far."""
    return 0.0 if model.backbone.compiled is None else model.backbone.compiled.seconds


def compare(
    model: FlextronModel,
    inputs: Inputs,
    selection: Selection,
    settings: Mapping[str, Any],
    tokens: int,
    drafting: Drafting | None = None,
) -> Interleaved[str]:
    """Time of the same number of tokens within a selection, relative to the full network's before and after it."""
    same = {**settings, "min_new_tokens": tokens, "max_new_tokens": tokens}
    run = partial(generate, model, inputs, settings=same)
    runs = {COMPARED: partial(run, selection=selection, drafting=drafting)}
    full = partial(run, selection=model.backbone.space.full())
    return interleaved(runs, full, range(ROUNDS), lambda each: each().seconds)
