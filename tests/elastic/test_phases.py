"""Budgets by phase: what is generated on one KV cache is what the same schedule gives without one."""

import pytest
import torch
from transformers import GenerationConfig

from flextron_lit.elastic.phases import ANSWER, PROMPT, THINK, PhasePolicy, Schedule, phase_policy
from flextron_lit.elastic.row_budgets import rows_of, together
from flextron_lit.space import SubNetwork
from tests.conftest import VOCABULARY, elastic_pair, with_compensation
from tests.options import seed

PADDED, PROMPT_TOKENS, NEW = 3, 9, 8
CLOSE = 1e-4
"""Of the largest logit, as rounding is."""


@pytest.fixture
def prompts():
    generator = torch.Generator().manual_seed(seed(7))
    tokens = torch.randint(1, VOCABULARY, (2, PROMPT_TOKENS), generator=generator)
    mask = torch.ones_like(tokens)
    tokens[0, :PADDED], mask[0, :PADDED] = 0, 0
    return {"input_ids": tokens, "attention_mask": mask}


def schedules(space):
    """Wide to narrow, narrow to wide with attention skipped meanwhile, and three widths in turn."""
    full, half, least = space.full(), space.uniform(mlp=0.5, attention=0.5), space.smallest()
    return {"falling": (full, half, half), "rising": (half, least, full), "all": (full, least, half)}


def generated(backbone, schedule, prompts):
    """Tokens [B, T] and the logits behind each of the answer's, [B, NEW, V]."""
    policy = PhasePolicy(schedule)
    settings = {**prompts, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    with backbone.selection.call(policy):
        made = backbone.model.generate(**policy.told(settings, backbone.model.generation_config))
    return made.sequences, torch.stack(made.logits, 1)


@torch.no_grad()
def uncached(backbone, schedule, tokens, mask):
    """The same logits, of all tokens read at once and without a cache."""
    policy = PhasePolicy(schedule)
    policy.hear(tokens, PROMPT_TOKENS)
    mask = torch.cat([mask, torch.ones(2, NEW, dtype=mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with backbone.use(policy):
        read = backbone.model(tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    return read.logits[:, PROMPT_TOKENS - 1 : -1]


def off(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("kind", ["falling", "rising", "all"])
def test_a_schedule_on_one_cache_equals_the_same_without(model, prompts, kind):
    _, backbone = elastic_pair(model)
    with_compensation(backbone)
    subs = schedules(backbone.space)[kind]
    # what the first sequence says third and fourth ends its thinking; the other's is its own
    said, _ = generated(backbone, Schedule(subs, (VOCABULARY,)), prompts)
    schedule = Schedule(subs, tuple(said[0, PROMPT_TOKENS + 2 : PROMPT_TOKENS + 4].tolist()))
    tokens, logits = generated(backbone, schedule, prompts)
    phases = schedule.phases(tokens, PROMPT_TOKENS)[0].tolist()
    assert {PROMPT, THINK, ANSWER} == set(phases)
    reference = uncached(backbone, schedule, tokens, prompts["attention_mask"])
    assert off(logits, reference) < CLOSE
    # the control: two phases with each other's budgets are another computation
    other = Schedule((subs[2], subs[1], subs[0]), schedule.switch)
    assert off(uncached(backbone, other, tokens, prompts["attention_mask"]), reference) > CLOSE


def test_thinking_is_over_behind_the_last_token_of_the_switch_and_stays_so():
    tokens = torch.tensor([[5, 6, 1, 5, 6, 2, 5, 6], [5, 6, 5, 5, 2, 6, 3, 5]])
    schedule = Schedule((SubNetwork((0,)),) * 3, (5, 6))
    # a switch in the prompt is none, nor one that began there
    assert schedule.phases(tokens, 3).tolist() == [[0, 0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert schedule.phases(tokens, 4).tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1, 1, 1]]
    assert schedule.phases(tokens[:, :4], 3).tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert Schedule(schedule.sub_networks).phases(tokens, 5)[0].tolist() == [0, 0, 0, 0, 0, 2, 2, 2]


class Words:
    """A tokenizer of one word each."""

    def __call__(self, text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [len(word) for word in text.split()]}


def policy(budgets, switch=None):
    return phase_policy(budgets, switch, Words(), lambda budget: SubNetwork((round(10 * budget),)))


def test_a_phase_without_a_budget_has_that_of_the_phase_behind_it():
    named = [{"answer": 0.7}, {"prompt": 1.0, "answer": 0.7}]
    assert [[sub.choices[0] for sub in policy(each).schedule.sub_networks] for each in named] == [[7] * 3, [10, 7, 7]]
    thinks = policy({"think": 0.6, "answer": 1.0}, "</think> now").schedule
    assert [sub.choices[0] for sub in thinks.sub_networks] == [6, 6, 10]
    assert thinks.switch == (8, 3)
    assert policy({"think": 0.6, "answer": 1.0}, [4, 2]).schedule.switch == (4, 2)


@pytest.mark.parametrize(
    ("budgets", "switch", "message"),
    [
        ({"prompt": 1.0}, None, "the answer has no budget"),
        ({"answers": 1.0}, None, "'answers' is no phase; budgets by phase are of prompt, think, answer"),
        ({"think": 0.5, "answer": 1.0}, None, "a budget for 'think' holds until a switch is generated"),
        ({"answer": 1.0}, "</think>", "a switch has no effect without one"),
        (None, "</think>", "a switch has no effect without one"),
        ({"think": 0.5, "answer": 1.0}, "", "has no tokens"),
    ],
)
def test_what_makes_no_schedule_is_one_clear_error(budgets, switch, message):
    with pytest.raises(ValueError, match=message):
        policy(budgets, switch)


@pytest.mark.parametrize("asked", [{"num_beams": 2}, {"custom_generate": print}, {"assistant_model": object()}])
def test_what_takes_tokens_back_is_refused(asked):
    heard = policy({"answer": 0.5})
    with pytest.raises(ValueError, match="budgets by phase are for greedy decoding or sampling, not for"):
        heard.told(asked, GenerationConfig())
    assert heard.told({"do_sample": True}, GenerationConfig())["do_sample"]


def test_rows_of_one_budget_run_together_and_come_back_in_their_order():
    assert rows_of([0.8, 0.6, 0.8, {"answer": 0.6}]) == [(0.8, [0, 2]), (0.6, [1]), ({"answer": 0.6}, [3])]
    first, second = torch.tensor([[1, 1], [2, 2], [5, 5], [6, 6]]), torch.tensor([[3, 3, 3], [4, 4, 4]])
    # two texts of each prompt
    joined = together([first, second], [[0, 2], [1]], pad=0)
    assert joined.tolist() == [[1, 1, 0], [2, 2, 0], [3, 3, 3], [4, 4, 4], [5, 5, 0], [6, 6, 0]]
