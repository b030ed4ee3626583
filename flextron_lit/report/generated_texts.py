"""Texts that a network writes within several budgets, side by side in the report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.evaluation.document_losses import Batch
from flextron_lit.generation.call import Chosen, generate, settings_for
from flextron_lit.generation.prompt import Inputs, encoded, room
from flextron_lit.model import FlextronModel
from flextron_lit.report.findings import Findings
from flextron_lit.report.spending.shown_texts import texts_of
from flextron_lit.routers.trained import TrainedDynamicRouter, TrainedRouter
from flextron_lit.stages.validation import FULL
from flextron_lit.stages.watched_losses import dynamic_answers, ladder_answers

BUDGETS = (0.8, 0.6)
"""Ratios of the full network's cost, each router's own."""
NEW_TOKENS = 40
PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Written:
    """A text, or why there is none."""

    kind: str
    """full, static or dynamic."""
    budget: float
    text: str
    spent: str = ""
    """What it cost: of a dynamic router the mean over its tokens, the prompt's included."""
    missing: str = ""
    """Why there is none."""

    @property
    def title(self) -> str:
        """What wrote it."""
        return "full network" if self.kind == FULL else f"{self.kind} router, budget {self.budget:g}"


def prompt_inputs(loaded: Loaded, prompt: str | None) -> tuple[Inputs, str]:
    """What every text goes on from, as inputs [1, T] and as text: the beginning of the validation text, by default.

    Raises:
        ValueError: if the checkpoint does not say what it was trained on.
    """
    if prompt is not None:
        config, begins = loaded.backbone.model.config, loaded.prompts_begin
        return encoded(loaded.tokenizer, config, prompt, chat=False, special_tokens=begins), prompt
    if loaded.text is None:
        raise ValueError(
            "the checkpoint does not say what it was trained on: say what texts go on from with --prompt, or leave "
            "them out with --no_texts"
        )
    return beginning(loaded, texts_of(loaded, None, _prompt_tokens(loaded)))


def beginning(loaded: Loaded, texts: Mapping[str, Sequence[Batch]]) -> tuple[Inputs, str]:
    """The same from the first of some texts, of which there is one or more."""
    ids = next(iter(texts.values()))[0]["input_ids"][:1, : _prompt_tokens(loaded)]
    text = str(loaded.tokenizer.decode(ids[0], skip_special_tokens=True))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, text


def _prompt_tokens(loaded: Loaded) -> int:
    # leaves room for what follows, however little the network reads at once
    return min(PROMPT_TOKENS, loaded.backbone.model.config.max_position_embeddings // 2)


def write_texts(model: FlextronModel, findings: Findings, inputs: Inputs) -> Iterator[Written]:
    """The likeliest text of the full network, and of every router at each of `BUDGETS`.

    Args:
        model: the network.
        findings: its routers.
        inputs: what to go on from.
    """
    tokens = room(inputs["input_ids"].shape[1], model.config, None)
    settings = settings_for(model.tokenizer, min(tokens, NEW_TOKENS))
    yield Written(FULL, 1.0, generate(model, inputs, model.backbone.space.full(), settings).text)
    routers = [router for router in (findings.static, findings.dynamic) if router is not None]
    for budget in BUDGETS:
        for router in routers:
            try:
                chosen = _answer(router, model, budget)
            except ValueError as error:
                # the report is of this network, whose range need not hold every budget
                yield Written(router.kind, budget, "", missing=str(error))
                continue
            made = generate(model, inputs, chosen.selection, settings)
            ((name, ratio),) = chosen.spent().items()
            yield Written(router.kind, budget, made.text, f"{ratio:.3f} of the full network's {name}")


def _answer(router: TrainedRouter | TrainedDynamicRouter, model: FlextronModel, budget: float) -> Chosen:
    """What a router answers to a budget.

    Raises:
        ValueError: if it is below the lowest that can be met.
    """
    if isinstance(router, TrainedRouter):
        (sub_network,) = ladder_answers(router.ladder, router.table, [budget]).values()
        return Chosen(sub_network, router.kind, {router.table.name: router.table.ratio(sub_network)})
    (policy,) = dynamic_answers(router, [budget], model.backbone.model).values()
    return Chosen(policy, router.kind, {})
