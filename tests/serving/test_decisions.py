"""What is decided without a network: who is next, what answers under load, what is told, which token is drawn."""

import pytest
import torch

from flextron_lit.serving.asked import Sampling
from flextron_lit.serving.drawing import next_token
from flextron_lit.serving.load_policy import LoadPolicy
from flextron_lit.serving.offer import Offer, Offered
from flextron_lit.serving.refusal import RequestError
from flextron_lit.serving.telling import Teller, held_back
from flextron_lit.serving.tokens import Lengths
from flextron_lit.serving.waiting import Waiting
from flextron_lit.space import SubNetwork

FULL, WIDE, NARROW = (Offered(f"{size}", SubNetwork((place,)), "", size) for place, size in enumerate((1.0, 0.8, 0.6)))
OFFER = Offer("owl", (FULL, WIDE, NARROW))


# --- who is next ------------------------------------------------------------------------------------------------


def order(waiting, running=()):
    counts = dict(running)
    return [waiting.take(counts) for _ in range(len(waiting))]


def test_budgets_take_turns_and_one_budget_keeps_its_order():
    waiting = Waiting()
    for job in ("a1", "a2", "a3", "b1", "a4", "b2", "c1"):
        waiting.put(job[0], job)
    assert len(waiting) == 7
    # a flood of one budget keeps nobody else waiting
    assert order(waiting) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert waiting.take({}) is None


def test_the_budget_with_the_fewest_running_is_next():
    waiting = Waiting()
    for job in ("a1", "b1", "c1"):
        waiting.put(job[0], job)
    assert order(waiting, {"a": 2, "b": 1}.items()) == ["c1", "b1", "a1"]


def test_who_leaves_waits_no_more():
    waiting = Waiting()
    for job in ("a1", "a2", "b1"):
        waiting.put(job[0], job)
    assert [waiting.remove(job) for job in ("a1", "b1", "b1")] == [True, True, False]
    assert order(waiting) == ["a2"]


# --- the load policy --------------------------------------------------------------------------------------------


def test_load_begins_and_ends_apart():
    policy = LoadPolicy(NARROW, requests=8)
    assert [policy.pressed(False, n) for n in (1, 7, 8, 9)] == [False, False, True, True]
    assert [policy.pressed(True, n) for n in (9, 5, 4, 1)] == [True, True, False, False]
    assert not LoadPolicy(None, requests=1).pressed(True, 100)


def test_what_answers_under_load_is_never_more_than_is_asked_nor_less_than_is_allowed():
    policy = LoadPolicy(WIDE)
    assert [policy.answered(asked, None, True) for asked in (FULL, WIDE, NARROW)] == [WIDE, WIDE, NARROW]
    assert [policy.answered(asked, None, False) for asked in (FULL, WIDE, NARROW)] == [FULL, WIDE, NARROW]
    assert [policy.answered(FULL, least, True) for least in (FULL, WIDE, NARROW)] == [FULL, WIDE, WIDE]
    # a bound above what is asked for asks for no more
    assert policy.answered(NARROW, FULL, True) is NARROW
    assert LoadPolicy().answered(FULL, None, True) is FULL


# --- names ------------------------------------------------------------------------------------------------------


def test_a_budget_is_a_model():
    assert OFFER.named("owl", None) is OFFER.named("", None) is OFFER.named("owl@1", None) is FULL
    assert OFFER.named("owl@0.80", None) is WIDE
    assert OFFER.named("owl@0.8", "0.6") is OFFER.named("@0.6", None) is NARROW
    assert OFFER.row("owl@0.80", 0)["budget"] == "0.8"
    assert [row["id"] for row in OFFER.listed(0)["data"]] == ["owl", "owl@1.0", "owl@0.8", "owl@0.6"]


@pytest.mark.parametrize("name", ["owl@0.7", "owl@", "cat", "cat@0.8", "owl@0.8@0.6", "owl@fast"])
def test_an_unknown_model_is_told_what_there_is(name):
    with pytest.raises(RequestError, match="there are owl@1.0, owl@0.8, owl@0.6") as refused:
        OFFER.named(name, None)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


def test_an_unknown_budget_is_told_what_there_is():
    with pytest.raises(RequestError, match="the budget '0.7' is not offered here; there are 1.0, 0.8, 0.6") as refused:
        OFFER.named("owl", "0.7")
    assert refused.value.status == 400


def test_lengths_are_those_of_operator_and_network():
    lengths = Lengths(prompt=10, answer=6, readable=14)
    assert [lengths.room(prompt, None) for prompt in (1, 8, 9, 10)] == [6, 6, 5, 4]
    assert lengths.room(10, 3) == 3
    for prompt, wanted, message in ((11, None, "has 11 tokens, but at most 10"), (10, 5, "5 tokens .* at most 4")):
        with pytest.raises(RequestError, match=message) as refused:
            lengths.room(prompt, wanted)
        assert refused.value.code == "context_length_exceeded"
    with pytest.raises(RequestError, match="at most 13"):
        Lengths(prompt=100, answer=6, readable=14).room(14, None)


# --- telling ----------------------------------------------------------------------------------------------------


def told(text, stops=()):
    """What is told of a text whose tokens are its bytes."""
    data = text.encode()
    teller = Teller(lambda tokens: bytes(tokens).decode(errors="replace"), stops)
    pieces = []
    for count in range(1, len(data) + 1):
        piece, stopped = teller.tell(data[:count], last=count == len(data))
        pieces.append(piece)
        if stopped:
            break
    return pieces


def test_characters_are_told_whole():
    pieces = told("aé€🦉b")
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "🦉", "b"]
    # a text that ends within one
    teller = Teller(lambda tokens: bytes(tokens).decode(errors="replace"))
    assert teller.tell(b"a\xe2", last=False) == ("a", False)
    assert teller.tell(b"a\xe2", last=True) == ("\ufffd", False)


def test_nothing_of_a_stop_is_told():
    assert told("so it ends", ["it e"]) == ["s", "o", " ", "", "", "", ""]
    assert "".join(told("iiit end", ["it e", "nd"])) == "ii"
    # what only began like one is told when that is known
    assert told("ab. abc.", ["abcd"]) == ["", "", "ab.", " ", "", "", "", "abc."]
    assert "".join(told("ab", ["abc"])) == "ab"
    assert held_back("xab", ["abc", "b2345"]) == 2


# --- drawing ----------------------------------------------------------------------------------------------------


def draws(logits, sampling, count=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [next_token(torch.tensor(logits), sampling, generator) for _ in range(count)]


def test_temperature_and_top_p_say_what_can_be_drawn():
    logits = [1.0, 3.0, 2.0, -40.0]
    assert set(draws(logits, Sampling(temperature=0))) == {1}
    assert set(draws(logits, Sampling())) == {0, 1, 2}
    # probabilities of 0.67 and 0.24, then 0.09
    assert set(draws(logits, Sampling(top_p=0.9))) == {1, 2}
    assert set(draws(logits, Sampling(top_p=0.6))) == set(draws(logits, Sampling(top_p=0.0))) == {1}
    assert set(draws(logits, Sampling(temperature=0.01))) == {1}


def test_a_seed_draws_the_same_again():
    logits = torch.zeros(50).tolist()
    assert draws(logits, Sampling(), seed=1) == draws(logits, Sampling(), seed=1)
    assert draws(logits, Sampling(), seed=1) != draws(logits, Sampling(), seed=2)
