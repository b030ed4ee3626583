"""Requests from several threads: every text is the one that its budget gets alone, or there is none."""

import copy
import random
import threading

import pytest
import torch
from transformers import DynamicCache, StoppingCriteriaList, TextIteratorStreamer

from flextron_lit import FlextronModel
from flextron_lit.generation.speculative import speculate
from tests.elastic.test_turns import TAKEN, elsewhere
from tests.served import write

TOKENS = torch.arange(1, 9)[None]
# of one sub-network after the other, and of tokens with widths of their own
REQUESTS = ({}, *({"budget": b} for b in (0.2, 0.5, 0.8)), *({"budget": b, "dynamic": True} for b in (0.76, 0.9)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return FlextronModel.from_pretrained(write(tmp_path_factory.mktemp("served") / "flextron"))


@pytest.fixture(autouse=True)
def at_rest(model):
    yield
    assert model.backbone.selection.current == model.backbone.space.full()


def generate(model, tokens=TOKENS, new=4, **settings):
    return model.generate(
        tokens, max_new_tokens=new, do_sample=False, pad_token_id=256, eos_token_id=None, **settings
    ).tolist()


class Each(list):
    """A stopping criterion that does something at every token, and stops nothing."""

    def __init__(self, action):
        super().__init__([self.stop])
        self.action = action

    def stop(self, ids, scores, **_):
        self.action()
        return torch.zeros(len(ids), dtype=torch.bool)

    @classmethod
    def token(cls, action):
        return StoppingCriteriaList(cls(action))


def test_a_hundred_requests_of_two_threads_get_their_own_texts(model):
    alone = [generate(model, new=2, **request) for request in REQUESTS]
    assert len({str(text) for text in alone}) == len(REQUESTS)
    found = []

    def ask(seed):
        draws = random.Random(seed)
        for _ in range(100):
            index = draws.randrange(len(REQUESTS))
            found.append(generate(model, new=2, **REQUESTS[index]) == alone[index])

    threads = [threading.Thread(target=ask, args=(seed,), daemon=True) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    # what ends by itself is waited for: nothing is refused either
    assert found == [True] * 200


def test_a_budget_is_set_when_generations_are_over(model):
    text, begun, threads = generate(model), threading.Event(), []

    def set_it():
        model.set_budget(0.6)
        begun.set()

    def once():
        if not threads:
            threads.append(threading.Thread(target=set_it))
            threads[0].start()
            begun.wait(0.05)
        assert not begun.is_set()

    assert generate(model, stopping_criteria=Each.token(once)) == text
    threads[0].join()
    assert model.backbone.selection.current == model.set_budget(0.6).sub_network
    model.set_budget(1.0)


def test_a_generation_cannot_change_its_own_budget(model):
    for request in ({}, {"budget": 0.6}):
        with pytest.raises(RuntimeError, match="in the middle of a generation"):
            generate(model, stopping_criteria=Each.token(lambda: model.set_budget(0.5)), **request)
    # but may ask another width for an opinion
    narrow = model.backbone.space.uniform(mlp=0.25)

    def ask():
        with model.use(narrow):
            model(TOKENS)

    assert generate(model, stopping_criteria=Each.token(ask)) == generate(model)


def drafted(model, **settings):
    return speculate(model.backbone, TOKENS, draft=model.backbone.space.smallest(), max_new_tokens=3, **settings)


@pytest.mark.parametrize("call", [generate, drafted])
def test_who_reads_what_a_refused_generation_streams_does_not_wait(model, call):
    def streamed(**settings):
        streamer = TextIteratorStreamer(model.tokenizer, timeout=30)
        with pytest.raises((RuntimeError, ValueError)) as raised:
            elsewhere(lambda: call(model, streamer=streamer, **settings))
        assert "".join(streamer) == ""
        return str(raised.value)

    with model.use(model.backbone.space.full()):
        assert TAKEN in streamed()
    assert streamed(nonsense=3)
    if call is generate:
        assert "the smallest parameters possible is" in streamed(budget=0.001)
        assert "dynamic has no effect" in streamed(dynamic=True)
        # given by place, as the library takes it too
        streamer = TextIteratorStreamer(model.tokenizer, timeout=30)
        with pytest.raises(ValueError, match="dynamic has no effect"):
            model.generate(TOKENS, None, None, None, None, None, None, streamer, dynamic=True)
        assert list(streamer) == [""]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_chat_goes_on_within_its_budget_alone(model, dynamic):
    cache = DynamicCache(config=model.config)
    settings = {"budget": 0.8, "dynamic": dynamic}
    first = torch.tensor(generate(model, past_key_values=cache, **settings))
    asked = torch.cat([first, TOKENS], 1)
    for other in ({}, {"budget": 0.5}, {"budget": 0.9, "dynamic": True}):
        with pytest.raises(ValueError, match="the KV cache was filled by a .*; go on with the budget that filled it"):
            generate(model, asked, past_key_values=copy.deepcopy(cache), **other)
    # what the model makes of the same budget again is no other one
    assert generate(model, asked, past_key_values=cache, **settings) == generate(model, asked, **settings)


def test_static_caches_take_the_heads_of_a_budget(model):
    text = generate(model, budget=0.5)
    for chunks in ({}, {"prefill_chunk_size": 3}):
        assert generate(model, budget=0.5, cache_implementation="static", **chunks) == text


def test_continuous_batching_is_for_the_full_network(model):
    refused = pytest.raises(ValueError, match="continuous batching runs the full network alone")
    narrow = model.backbone.space.uniform(mlp=0.25)
    with refused:
        generate(model, budget=0.5, cache_implementation="paged")
    with model.use(model.backbone.space.full()), refused:
        model.generate_batch([[1, 2]])
    model.set_budget(0.5)
    with refused:
        model.generate_batch([[1, 2]])
    # when it has begun already, in a thread of its own
    with refused:
        model(TOKENS, cache=object())
    model.set_budget(1.0)
    with model.use(narrow), pytest.raises(RuntimeError, match=TAKEN):
        elsewhere(lambda: model(TOKENS, cache=object()))
