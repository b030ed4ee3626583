"""Threads that run one network: who waits, who is refused, and that nobody gets another's widths."""

import asyncio
import copy
import io
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaModel

from flextron_lit.elastic import ElasticBackbone, turns
from tests.conftest import SPACE, make_llama
from tests.elastic.test_grouping import Linear

TAKEN = "another thread or task is using this elastic backbone"


def elsewhere(action):
    """What an action gives in another thread, or raises there."""
    found = []

    def run():
        try:
            found.append(action())
        except BaseException as error:  # told below
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert found, "it hangs"
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


@pytest.fixture
def narrow(backbone):
    return backbone.space.uniform(mlp=0.25)


@pytest.fixture
def logits(backbone, tokens):
    """Of what is active."""
    return torch.no_grad()(lambda: backbone.model(tokens).logits)


# --- whose turn it is -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_no_forward_of_another_thread_runs_inside_use(backbone, narrow, tokens, logits):
    full = logits()
    ways = [backbone.model, backbone.model.forward, backbone.model.model]
    with backbone.use(narrow):
        for way in ways:
            with pytest.raises(RuntimeError, match=TAKEN):
                elsewhere(lambda way=way: way(tokens))
        with pytest.raises(RuntimeError, match=TAKEN):
            elsewhere(lambda: backbone.selection.set(narrow))
        assert not torch.equal(logits(), full)
    assert torch.equal(elsewhere(logits), full)


def test_what_changes_the_network_waits_for_passes_and_calls(backbone, narrow, tokens, logits):
    """Both threads would change it in the middle of the pass, if they did not wait."""
    full, begun, ended = logits(), threading.Event(), []
    hook = backbone.model.model.layers[1].register_forward_hook(lambda *_: begun.set())

    def use():
        with backbone.use(narrow):
            ended.append("use")

    threads = [threading.Thread(target=use), threading.Thread(target=lambda: backbone.selection.set(narrow))]
    with backbone.selection.call():
        before = logits()
        assert begun.is_set()
        for thread in threads:
            thread.start()
        # they queue; this thread's own passes go on
        while len(backbone.selection.turns._queue) < 2:
            pass
        ended.append("call")
        assert torch.equal(logits(), before)
    for thread in threads:
        thread.join()
    hook.remove()
    assert torch.equal(before, full)
    assert ended == ["call", "use"]
    assert backbone.selection.current == narrow


def test_threads_run_the_network_together_as_it_stands(backbone, logits):
    full, meeting = logits(), threading.Barrier(2, timeout=60)

    def meet(*_):
        # if one waited for the other, the barrier would break
        meeting.wait()

    hook = backbone.model.model.layers[1].register_forward_hook(meet)
    thread = threading.Thread(target=logits)
    thread.start()
    assert torch.equal(logits(), full)
    thread.join()
    hook.remove()


def test_passes_of_a_policy_come_one_by_one(backbone, tokens, logits):
    policy = Linear(backbone.space)
    backbone.selection.set(policy)
    alone = logits()
    runs = [threading.Thread(target=logits) for _ in range(4)]
    for thread in runs:
        thread.start()
    assert torch.equal(logits(), alone)
    for thread in runs:
        thread.join()
    assert len(policy.passes) == 6
    assert backbone.selection.turns.together is False


def test_one_that_waits_for_who_waits_for_it_is_refused(backbone, narrow, logits, monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    with backbone.selection.call(narrow), pytest.raises(RuntimeError, match="has not run it for 0.05 s"):
        elsewhere(logits)
    elsewhere(logits)


def test_two_that_run_it_together_do_not_wait_for_each_other_to_end(backbone, narrow):
    both, ends = threading.Barrier(2, timeout=60), []

    def widen():
        with backbone.selection.call():
            both.wait()
            try:
                with backbone.use(narrow):
                    ends.append("had it")
            except RuntimeError:
                ends.append("refused")

    threads = [threading.Thread(target=widen) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["refused", "had it"] or ends == ["had it", "refused"]
    assert not backbone.selection.turns.taken


def test_a_task_between_two_steps_of_another_is_refused(backbone, narrow, logits):
    async def user(inside):
        with backbone.use(narrow):
            inside.set()
            await asyncio.sleep(0)
            return logits()

    async def other(inside):
        await inside.wait()
        with pytest.raises(RuntimeError, match=TAKEN):
            logits()

    async def both():
        inside = asyncio.Event()
        return await asyncio.gather(user(inside), other(inside))

    asyncio.run(both())
    assert backbone.selection.current == backbone.space.full()


# --- turns that end unusually -----------------------------------------------------------------------------------


def test_generators_inside_use_leave_nothing_behind(backbone, narrow, logits):
    full = logits()

    def texts(selection):
        with backbone.use(selection):
            yield logits()
            yield logits()

    # another thread than began it: a web server's pool, say
    moved = texts(narrow)
    next(moved)
    with pytest.raises(RuntimeError, match=TAKEN):
        elsewhere(lambda: next(moved))
    assert torch.equal(elsewhere(logits), full)
    # the thread that began it is gone, and the next may have its number
    left = texts(narrow)
    elsewhere(lambda: next(left))
    with pytest.raises(RuntimeError, match=TAKEN):
        elsewhere(logits)
    left.close()
    # not in the order in which they began
    first, second = texts(narrow), texts(backbone.space.uniform(mlp=0.5))
    next(first), next(second)
    first.close()
    second.close()
    assert torch.equal(elsewhere(logits), full)


def test_an_interrupted_pass_is_over(backbone, logits):
    def interrupt(*_):
        raise KeyboardInterrupt

    full = logits()
    hook = backbone.model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits()
    hook.remove()
    with backbone.use(backbone.space.full()):
        assert torch.equal(logits(), full)
    assert torch.equal(elsewhere(logits), full)


# --- passes that other threads run for whoever has the network --------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_backward_may_recompute_on_another_thread(tokens, narrow, whole):
    """As on CUDA, where backward has threads of its own."""
    plain, checkpointed = (ElasticBackbone(make_llama(), SPACE) for _ in range(2))
    checkpointed.enable_activation_checkpointing()
    for backbone in (plain, checkpointed):
        backbone.model.train()

        def loss(ids, model=backbone.model):
            return model(ids, labels=ids, use_cache=False).loss

        with backbone.use(narrow):
            found = checkpoint(loss, tokens, use_reentrant=False) if whole else loss(tokens)
            elsewhere(found.backward)
        # and what it computed is its own selection's
    gradients = [[p.grad for p in b.model.parameters() if p.grad is not None] for b in (plain, checkpointed)]
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(map(torch.equal, *gradients))


@torch.no_grad()
def test_replicas_run_in_threads_of_whoever_has_the_network(backbone, narrow, tokens):
    with backbone.use(narrow):
        expected = backbone.model.model(tokens).last_hidden_state
        replica = backbone.model.model._replicate_for_data_parallel()
        assert torch.equal(elsewhere(torch.no_grad()(lambda: replica(tokens).last_hidden_state)), expected)


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_without_a_break(backbone, narrow, tokens, logits):
    compiled = torch.compile(backbone.model, backend="eager", fullgraph=True)
    for selection in (backbone.space.full(), narrow):
        with backbone.use(selection):
            torch.testing.assert_close(compiled(tokens).logits, logits())


@torch.no_grad()
def test_copies_and_pickles_are_networks_of_their_own(backbone, narrow, logits, tokens):
    full = logits()
    file = io.BytesIO()
    with backbone.use(backbone.space.full()):
        copied = copy.deepcopy(backbone.model)
        torch.save(backbone.model, file)
    file.seek(0)
    for own in (copied, torch.load(file, weights_only=False)):
        with backbone.use(narrow):
            assert torch.equal(elsewhere(torch.no_grad()(lambda own=own: own(tokens).logits)), full)
    assert type(backbone.undo().model) is LlamaModel


# --- KV caches --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_belongs_to_what_filled_it(backbone, narrow, tokens):
    def step(cache):
        return backbone.model(tokens[:, :1], past_key_values=cache)

    given = DynamicCache(config=backbone.model.config)
    backbone.model(tokens, past_key_values=given)
    caches = [
        given,
        copy.deepcopy(given),
        backbone.model(tokens, use_cache=True).past_key_values,
        backbone.model(tokens, use_cache=True, return_dict=False)[1],
    ]
    for cache in caches:
        # only neurons differ, so that shapes fit
        with (
            backbone.use(narrow),
            pytest.raises(ValueError, match=r"uses 64 units of layers.0.mlp, but .* uses 16; go"),
        ):
            step(cache)
        # the same widths by another name
        with backbone.use(backbone.space.uniform()):
            step(cache)
    with backbone.use(Linear(backbone.space)):
        with pytest.raises(ValueError, match="filled by a sub-network, but a policy"):
            step(given)
        own = backbone.model(tokens, use_cache=True).past_key_values
        step(own)
        with backbone.use(Linear(backbone.space)), pytest.raises(ValueError, match="filled by a policy"):
            step(own)
    with backbone.use(narrow), pytest.raises(ValueError, match="filled by a policy"):
        step(own)


@torch.no_grad()
def test_a_cache_that_nobody_knows_has_to_fit(backbone, tokens):
    known = backbone.model(tokens, use_cache=True).past_key_values
    unknown = DynamicCache()
    for layer, each in enumerate(known.layers):
        unknown.update(each.keys, each.values, layer)
    with (
        backbone.use(backbone.space.uniform(0.5, 0.5)),
        pytest.raises(ValueError, match=r"filled with 4 KV groups in layers.0.attention, but 2 are active"),
    ):
        backbone.model(tokens[:, :1], past_key_values=unknown)
    backbone.model(tokens[:, :1], past_key_values=unknown)


@torch.no_grad()
def test_an_emptied_cache_takes_other_heads(backbone, tokens):
    half = backbone.space.uniform(0.5, 0.5)
    dynamic, static = (DynamicCache(config=backbone.model.config), StaticCache(backbone.model.config, max_cache_len=32))
    for cache in (dynamic, static):
        backbone.model(tokens, past_key_values=cache)
    dynamic.crop(-tokens.shape[1])
    static.reset()
    with backbone.use(half):
        expected = backbone.model(tokens, use_cache=False).logits
        for cache in (dynamic, static):
            torch.testing.assert_close(backbone.model(tokens, past_key_values=cache).logits, expected)
