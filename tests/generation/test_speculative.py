import math
from dataclasses import astuple

import pytest
import torch
from transformers import DynamicCache, GPT2LMHeadModel, MistralForCausalLM

from flextron_lit.costs import CostTable
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.generation import speculative
from flextron_lit.generation.speculative import agreed, sampled, speculate
from flextron_lit.routers.dynamic import DynamicPolicy, DynamicRouter
from flextron_lit.space import SubNetwork
from tests import options
from tests.conftest import VOCABULARY, make_gpt2, make_llama, make_rotary, space_for

NEW = 23
CLEAR = 1e-6
"""Between the two best logits: far above the rounding of double precision, so that the text is no matter of chance."""
DRAFTS = {
    "wide": SubNetwork((2, 3, 3, 3, 3, 2)),
    "half": SubNetwork((1, 2, 2, 2, 2, 2)),
    "narrow": SubNetwork((0, 1, 1, 1, 1, 1)),
    "skipping": SubNetwork((2, 3, 0, 0, 3, 3)),
}


@pytest.fixture(params=[make_llama, make_gpt2], ids=["llama", "gpt2"], scope="module")
def elastic(request):
    # untied, or GPT-2 says the same token for ever
    model = request.param(tie_word_embeddings=False).double()
    return ElasticBackbone(model, space_for(model))


@pytest.fixture
def llama():
    model = make_llama(tie_word_embeddings=False).double()
    return ElasticBackbone(model, space_for(model))


def prompts(count=3):
    generator = torch.Generator().manual_seed(options.seed(5))
    return [torch.randint(1, VOCABULARY, (1, 3 + 4 * i), generator=generator) for i in range(count)]


def alone(backbone, prompt, selection=None, **settings):
    """Greedy decoding of one selection, with a choice that is clear at every step."""
    with backbone.use(selection or backbone.space.full()):
        made = backbone.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **({"max_new_tokens": NEW} | settings),
        )
    best = torch.stack(made.scores).topk(2).values
    assert float((best[..., 0] - best[..., 1]).min()) > CLEAR
    return made.sequences


def uncached(backbone, prompt, draft, draft_tokens, new=NEW, confidence=0.0):
    """What speculation has to count, by definition: whole passes without a cache."""
    tokens, end = prompt, prompt.shape[1] + new
    drafted = accepted = passes = 0

    @torch.no_grad()
    def logits(selection, ids):
        with backbone.use(selection):
            return backbone.model(ids, use_cache=False).logits[0]

    while tokens.shape[1] < end:
        known, count = tokens.shape[1], min(draft_tokens, end - tokens.shape[1] - 1)
        behind = tokens
        for place in range(1, count + 1):
            likely, token = logits(draft, behind)[-1:].float().softmax(-1).max(-1)
            behind = torch.cat([behind, token[None]], -1)
            if float(likely) < confidence:
                count = place
                break
        right = logits(backbone.space.full(), behind).argmax(-1)[known - 1 :]
        same = 0
        while same < count and right[same] == behind[0, known + same]:
            same += 1
        tokens = torch.cat([tokens, right[None, : same + 1]], -1)
        drafted, accepted, passes = drafted + count, accepted + same, passes + 1
    return tokens, drafted, accepted, passes


def policy(backbone, price=0.3):
    """A router whose choices differ from token to token."""
    generator = torch.Generator().manual_seed(options.seed(3))
    space = backbone.space
    table = CostTable("units", "units", 0.0, tuple(tuple(float(w) for w in block.widths) for block in space.blocks))
    router = DynamicRouter(space, backbone.model.config.hidden_size, torch.tensor([0.2, 1.0]))
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.bias.copy_(2.0 * torch.arange(space.num_choices))
    return DynamicPolicy(router, table, [0.6], [price], dtype=backbone.model.dtype)


class Recorder:
    """A streamer that remembers."""

    def __init__(self):
        self.told, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.told.append(value.flatten().tolist())

    def end(self):
        self.ended += 1


# --- greedy decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "draft_tokens"), [("wide", 1), ("wide", 3), ("half", 8), ("narrow", 3), ("skipping", 3)]
)
def test_the_text_is_the_full_networks_and_the_counts_are_by_definition(elastic, draft, draft_tokens):
    for prompt in prompts(2):
        settings = {"draft_tokens": draft_tokens, "confidence": 0, "max_new_tokens": NEW}
        made = speculate(elastic, prompt, draft=DRAFTS[draft], **settings)
        tokens, *counts = uncached(elastic, prompt, DRAFTS[draft], draft_tokens)
        assert torch.equal(made.tokens, alone(elastic, prompt))
        assert torch.equal(made.tokens, tokens)
        assert [made.drafted, made.accepted, made.passes] == counts
        assert made.accepted + made.passes == NEW


def test_drafts_are_accepted_and_refused_so_that_these_tests_see_both(elastic):
    drafts = [elastic.space.full(), *DRAFTS.values(), elastic.space.smallest()]
    made = [speculate(elastic, prompt, draft=draft, max_new_tokens=NEW) for prompt in prompts() for draft in drafts]
    assert 0 < sum(one.accepted for one in made) < sum(one.drafted for one in made)
    # a draft's own text is another one
    assert not torch.equal(made[0].tokens, alone(elastic, prompts()[0], DRAFTS["narrow"]))


def test_accepting_whatever_is_drafted_gives_another_text(elastic, monkeypatch):
    monkeypatch.setattr(speculative, "agreed", lambda drafted, verifier: torch.cat([drafted, verifier[-1:].argmax(-1)]))
    made = speculate(elastic, prompts()[0], draft=DRAFTS["half"], max_new_tokens=NEW)
    assert made.acceptance == 1
    assert not torch.equal(made.tokens, alone(elastic, prompts()[0]))


@pytest.mark.parametrize(("new", "passes"), [(1, 1), (4, 1), (5, 1), (6, 2), (10, 2), (23, 5)])
def test_a_draft_as_wide_as_the_verifier_is_always_right(elastic, new, passes):
    prompt = prompts()[1]
    made = speculate(elastic, prompt, draft=elastic.space.full(), draft_tokens=4, confidence=0, max_new_tokens=new)
    assert torch.equal(made.tokens, alone(elastic, prompt, max_new_tokens=new))
    assert (made.passes, made.accepted, made.drafted) == (passes, new - passes, new - passes)


def test_a_draft_that_is_not_confident_stops_early(elastic):
    prompt = prompts()[0]
    # the most that it gives a token is about 0.1
    for confidence in (0, 0.08, 0.1, 0.12, 1):
        settings = {"draft_tokens": 8, "confidence": confidence, "max_new_tokens": NEW}
        made = speculate(elastic, prompt, draft=DRAFTS["wide"], **settings)
        tokens, *counts = uncached(elastic, prompt, DRAFTS["wide"], 8, confidence=confidence)
        assert torch.equal(made.tokens, alone(elastic, prompt))
        assert torch.equal(made.tokens, tokens)
        assert [made.drafted, made.accepted, made.passes] == counts
    # the token of which it is not sure is proposed too
    assert made.passes - 1 <= made.drafted <= made.passes
    # what is never sure enough proposes one for each that the verifier adds, and what always is proposes all it may
    sure = speculate(elastic, prompt, draft=elastic.space.full(), draft_tokens=8, confidence=0, max_new_tokens=NEW)
    unsure = speculate(elastic, prompt, draft=elastic.space.full(), draft_tokens=8, confidence=1, max_new_tokens=NEW)
    assert (sure.passes, sure.drafted) == (3, NEW - 3)
    assert (unsure.passes, unsure.drafted) == (12, NEW - 12)


def test_a_hopeless_draft_costs_passes_and_changes_nothing(elastic, monkeypatch):
    prompt = prompts()[2]
    answer, propose = alone(elastic, prompt)[0], speculative._Chooser.propose

    def wrong(self, draft, tokens, most):
        """Always another token than the verifier takes."""
        drafted, probabilities = propose(self, draft, tokens, most)
        return (answer[tokens.shape[1] :][: len(drafted)] + 1) % VOCABULARY, probabilities

    monkeypatch.setattr(speculative._Chooser, "propose", wrong)
    made = speculate(elastic, prompt, draft=elastic.space.smallest(), max_new_tokens=NEW)
    assert torch.equal(made.tokens[0], answer)
    assert (made.accepted, made.acceptance, made.passes) == (0, 0, NEW)
    assert made.drafted >= NEW - 1


def test_any_selection_can_verify(elastic):
    prompt, verifier = prompts()[0], DRAFTS["wide"]
    made = speculate(elastic, prompt, draft=DRAFTS["half"], verifier=verifier, max_new_tokens=NEW)
    assert torch.equal(made.tokens, alone(elastic, prompt, verifier))
    assert not torch.equal(made.tokens, alone(elastic, prompt))


def test_a_policy_drafts_or_verifies(elastic):
    prompt, dynamic = prompts()[1], policy(elastic)
    drafted = speculate(elastic, prompt, draft=dynamic, max_new_tokens=NEW)
    shares = dynamic.take()
    assert (shares.max(-1).values < shares.sum(-1)).any()
    assert torch.equal(drafted.tokens, alone(elastic, prompt))
    verified = speculate(elastic, prompt, draft=DRAFTS["half"], verifier=dynamic, max_new_tokens=NEW)
    assert torch.equal(verified.tokens, alone(elastic, prompt, dynamic))
    assert not torch.equal(verified.tokens, drafted.tokens)


@pytest.mark.parametrize("draft", ["wide", "skipping"])
def test_a_sliding_window_slides_over_what_was_taken_back(draft):
    model = make_rotary(MistralForCausalLM, sliding_window=8, tie_word_embeddings=False).double()
    backbone = ElasticBackbone(model, space_for(model))
    for prompt in prompts():
        made = speculate(backbone, prompt, draft=DRAFTS[draft], max_new_tokens=NEW)
        assert torch.equal(made.tokens, alone(backbone, prompt))


# --- where it ends ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["half", "full"])
def test_it_ends_with_the_token_that_ends_a_text_wherever_a_draft_has_it(elastic, draft):
    selection = DRAFTS.get(draft, elastic.space.full())
    prompt = prompts()[0]
    # no token twice, so that each of them can be the one that ends the text
    settings = {"no_repeat_ngram_size": 1}
    answer = alone(elastic, prompt, **settings)[0, prompt.shape[1] :].tolist()
    assert len(set(answer)) == NEW
    for first in range(NEW):
        settings["eos_token_id"] = answer[first]
        made = speculate(elastic, prompt, draft=selection, max_new_tokens=NEW, **settings)
        assert made.tokens[0, prompt.shape[1] :].tolist() == answer[: first + 1]
        assert made.accepted + made.passes in (first + 1, first + 2)


def test_it_ends_where_a_criterion_says_so_in_the_middle_of_a_draft(elastic):
    prompt = prompts()[0]

    def seven(tokens, scores):
        return torch.tensor([tokens.shape[1] == prompt.shape[1] + 7])

    settings = {"max_new_tokens": NEW, "stopping_criteria": [seven]}
    made = speculate(elastic, prompt, draft=elastic.space.full(), **settings)
    assert torch.equal(made.tokens, alone(elastic, prompt)[:, : prompt.shape[1] + 7])


def test_processors_see_every_token_in_its_turn(elastic):
    prompt, settings = prompts()[0], {"repetition_penalty": 1.7, "min_new_tokens": 9, "eos_token_id": [3, 4, 5]}
    wanted = alone(elastic, prompt, **settings)
    made = speculate(elastic, prompt, draft=DRAFTS["wide"], max_new_tokens=NEW, **settings)
    assert torch.equal(made.tokens, wanted)
    assert not torch.equal(made.tokens, alone(elastic, prompt))


def test_the_models_last_position_is_used_and_no_more_than_there_are(elastic):
    positions = elastic.model.config.max_position_embeddings
    prompt = torch.ones(1, positions - 6, dtype=torch.long)
    made = speculate(elastic, prompt, draft=DRAFTS["half"], draft_tokens=8, max_new_tokens=6)
    assert made.tokens.shape[1] == positions
    if isinstance(elastic.model, GPT2LMHeadModel):
        with pytest.raises(ValueError, match=f"takes {positions + 1} positions, but the model has {positions}"):
            speculate(elastic, prompt, draft=DRAFTS["half"], max_new_tokens=7)
    else:
        made = speculate(elastic, prompt, draft=DRAFTS["half"], max_new_tokens=7)
        assert torch.equal(made.tokens, alone(elastic, prompt, max_new_tokens=7))


# --- what it leaves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [None, 4], ids=["whole", "ended"])
@pytest.mark.parametrize("draft", ["half", "full"])
def test_the_verifiers_cache_is_that_of_plain_decoding(elastic, draft, eos):
    prompt = prompts()[1]
    plain, cache = DynamicCache(), DynamicCache()
    answer = alone(elastic, prompt, past_key_values=plain)
    if eos is not None:
        eos, plain = int(answer[0, prompt.shape[1] + eos]), DynamicCache()
        answer = alone(elastic, prompt, past_key_values=plain, eos_token_id=eos)
    selection = DRAFTS.get(draft, elastic.space.full())
    settings = {"max_new_tokens": NEW, "past_key_values": cache, "eos_token_id": eos}
    assert torch.equal(speculate(elastic, prompt, draft=selection, **settings).tokens, answer)
    assert cache.get_seq_length() == answer.shape[1] - 1
    for one, other in zip(cache.layers, plain.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.values, other.values, atol=1e-4, rtol=1e-4)


def test_a_conversation_goes_on_from_its_cache(llama):
    cache, prompt = DynamicCache(), prompts()[0]
    first = speculate(llama, prompt, draft=DRAFTS["half"], max_new_tokens=5, past_key_values=cache).tokens
    longer = torch.cat([first, prompts()[1]], -1)
    made = speculate(llama, longer, draft=DRAFTS["half"], max_new_tokens=NEW, past_key_values=cache)
    assert torch.equal(made.tokens, alone(llama, longer))


def test_what_was_active_is_active_again_also_after_an_error(llama):
    def fail(tokens, scores):
        raise KeyError

    llama.selection.set(DRAFTS["narrow"])
    speculate(llama, prompts()[0], draft=DRAFTS["half"], max_new_tokens=3)
    assert llama.selection.current == DRAFTS["narrow"]
    with pytest.raises(KeyError):
        speculate(llama, prompts()[0], draft=policy(llama), max_new_tokens=3, stopping_criteria=[fail])
    assert llama.selection.current == DRAFTS["narrow"]
    assert not llama.model._forward_pre_hooks


def test_a_streamer_is_told_the_prompt_and_what_each_pass_gave(llama):
    recorder = Recorder()
    made = speculate(llama, prompts()[0], draft=llama.space.full(), max_new_tokens=NEW, streamer=recorder)
    assert recorder.told[0] == prompts()[0][0].tolist()
    assert [token for told in recorder.told for token in told] == made.tokens[0].tolist()
    assert len(recorder.told) == 1 + made.passes < 1 + NEW
    assert recorder.ended == 1


def test_greedy_decoding_draws_no_random_number(llama):
    state = torch.get_rng_state()
    speculate(llama, prompts()[0], draft=DRAFTS["half"], max_new_tokens=NEW)
    assert torch.equal(torch.get_rng_state(), state)


# --- sampling ---------------------------------------------------------------------------------------------------


def distribution(seed, rows=1, size=5):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(options.seed(seed))).softmax(-1)


def distance(drawn, probabilities):
    """Total variation between what was drawn and what should be."""
    found = torch.bincount(torch.tensor(drawn), minlength=len(probabilities)) / len(drawn)
    return float((found - probabilities).abs().sum() / 2)


def most(draws, values):
    """What the distance is below but for one case in a million (its mean, and McDiarmid's inequality)."""
    return (values / draws) ** 0.5 / 2 + (math.log(1e6) / (2 * draws)) ** 0.5


def test_sampled_tokens_are_distributed_as_the_verifiers():
    torch.manual_seed(options.seed(0))
    # half of what the draft proposes is refused
    draft = torch.tensor([[0.4, 0.3, 0.2, 0.1, 0.0]])
    verifier = torch.tensor([[0.1, 0.1, 0.2, 0.3, 0.3], [0.05, 0.15, 0.2, 0.25, 0.35]])
    drafts = [torch.multinomial(draft[0], 1) for _ in range(8000)]
    taken = [sampled(drafted, draft, verifier).tolist() for drafted in drafts]
    behind = [tokens[1] for tokens in taken if len(tokens) > 1]
    assert 3000 < len(behind) < 5000
    assert distance([tokens[0] for tokens in taken], verifier[0]) < most(8000, 5)
    assert distance(behind, verifier[1]) < most(3000, 5)
    # the draft itself is no such sample
    assert distance([int(drafted) for drafted in drafts], verifier[0]) > 0.5 - most(8000, 5) > 5 * most(8000, 5)


def test_a_rejection_that_only_rounding_allows_draws_from_the_verifier():
    draft, verifier = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.5, 0.0], [1.0, 0.0]])
    assert sampled(torch.tensor([1]), draft, verifier).tolist() == [0]


def test_greedy_acceptance_stops_at_the_first_difference():
    verifier = torch.nn.functional.one_hot(torch.tensor([3, 1, 4, 1]), 5).float()
    assert agreed(torch.tensor([3, 1, 4]), verifier).tolist() == [3, 1, 4, 1]
    assert agreed(torch.tensor([3, 0, 4]), verifier).tolist() == [3, 1]
    assert agreed(torch.tensor([0, 1, 4]), verifier).tolist() == [3]


def test_sampling_has_the_full_networks_distribution(llama):
    prompt, settings = prompts()[0], {"do_sample": True, "temperature": 2.0, "top_k": 3, "max_new_tokens": 3}
    torch.manual_seed(options.seed(0))
    made = [speculate(llama, prompt, draft=DRAFTS["wide"], confidence=0.5, **settings) for _ in range(250)]
    assert all(one.accepted + one.passes == 3 for one in made)
    assert all(one.accepted <= one.drafted for one in made)

    def probabilities(tokens, selection):
        with llama.use(selection), torch.no_grad():
            logits = llama.model(tokens).logits[0, -1] / 2.0
        return logits.masked_fill(logits < logits.topk(3).values[-1], -torch.inf).softmax(-1)

    first = probabilities(prompt, llama.space.full())
    pairs = torch.zeros(VOCABULARY, VOCABULARY, dtype=first.dtype)
    for token in first.nonzero():
        pairs[token] = first[token] * probabilities(torch.cat([prompt, token[None]], -1), llama.space.full())
    drawn = [int(one.tokens[0, -3] * VOCABULARY + one.tokens[0, -2]) for one in made]
    assert distance(drawn, pairs.flatten()) < most(250, 9)
    assert distance([int(one.tokens[0, -3]) for one in made], first) < most(250, 3)
    # each is one of the verifier's three likeliest, whatever the draft takes for likely
    assert all(first[one.tokens[0, -3]] > 0 for one in made)
    assert (first > 0).sum() == 3


# --- mistakes ---------------------------------------------------------------------------------------------------

PADDED = torch.tensor([[0, 1, 1]])
REFUSED = {
    "draft_tokens": ({"draft_tokens": 0}, "1 or more, not 0"),
    "confidence": ({"confidence": 1.5}, "from 0 to 1, not 1.5"),
    "beams": ({"num_beams": 2}, "beam_search"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
    "scores": ({"return_dict_in_generate": True}, "without scores"),
    "sequences": ({"num_return_sequences": 2, "do_sample": True}, "one sequence"),
    "no cache": ({"use_cache": False}, "dynamic KV cache"),
    "static cache": ({"cache_implementation": "static"}, "dynamic KV cache"),
    "padding": ({"attention_mask": PADDED}, "without padding"),
    "assistant": ({"assistant_model": object()}, "assistant_model has no effect"),
    "model's": ({"output_attentions": True, "output_hidden_states": True}, "no effect"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_what_it_does_not_do_is_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        speculate(llama, prompts()[0], draft=DRAFTS["half"], **({"max_new_tokens": 3} | settings))


def test_more_than_one_sequence_is_refused(llama):
    with pytest.raises(ValueError, match="1 sequence, not 2"):
        speculate(llama, torch.ones(2, 3, dtype=torch.long), draft=DRAFTS["half"], max_new_tokens=3)


def test_a_selection_of_another_space_is_refused(llama):
    with pytest.raises(ValueError, match="blocks"):
        speculate(llama, prompts()[0], draft=SubNetwork((0, 0)), max_new_tokens=3)


def test_nothing_drafted_is_an_acceptance_of_0(llama):
    made = speculate(llama, prompts()[0], draft=DRAFTS["half"], max_new_tokens=1)
    assert astuple(made)[1:] == (0, 0, 1)
    assert made.acceptance == 0
