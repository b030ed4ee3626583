"""Grouped execution: every token with its own width, held to a reference that masks units of the dense model."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.grouping import Band, group
from flextron_lit.space import SubNetwork
from tests import options
from tests.conftest import ATTENTION, MODELS, elastic_pair, space_for
from tests.elastic.test_families import TOLERANCE, WRONG, inputs_of, output_of, with_attention

# alike 0 skips whatever may be skipped
MIXTURES = ("random", "uneven", "wide", *(f"alike {choice}" for choice in range(4)))
# what is the same for all variants of a family is tested on one of each
FAMILIES = ("llama-biased", "gpt-neox", "gpt2")


class Recording:
    """What passes and blocks tell a policy."""

    def __init__(self):
        self.passes = []
        self.counts = {}

    def begin(self, real):
        self.passes.append(real)

    def note(self, block, counts):
        total = self.counts.get(block, [0] * len(counts))
        self.counts[block] = [one + other for one, other in zip(total, counts, strict=True)]


class Fixed(Recording):
    """Choices that were made before, whatever the tokens are."""

    def __init__(self, choices):
        super().__init__()
        self.choices = choices

    def choose(self, block, hidden_states):
        return self.choices[block]


class Linear(Recording):
    """A linear map of the token's own hidden state, and the largest of its outputs."""

    def __init__(self, space, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(options.seed(seed))
        # the hidden size of every tiny model
        self.weights = [torch.randn(len(block.widths), 32, generator=generator) for block in space.blocks]

    def choose(self, block, hidden_states):
        return F.linear(hidden_states.detach(), self.weights[block].to(hidden_states.dtype)).argmax(-1)


def mixture(name, space, shape, generator):
    """Choices of every block for so many tokens."""

    def draw(low, high):
        return torch.randint(low, high, shape, generator=generator)

    choices = []
    for block in space.blocks:
        last = len(block.widths) - 1
        if name == "random":
            chosen = draw(0, last + 1)
        elif name == "uneven":
            # all but one token take the same
            chosen = torch.full(shape, last)
            chosen.view(-1)[draw(0, chosen.numel()).view(-1)[0]] = draw(0, last).view(-1)[0]
        elif name == "wide":
            chosen = draw(1, last + 1)
        else:
            chosen = torch.full(shape, min(int(name.split()[1]), last))
        choices.append(chosen)
    return choices


def masked(model, space, choices):
    """Reference: a copy of the dense model whose units are multiplied by zero where a token does not use them."""
    model = copy.deepcopy(model)
    for block, chosen in zip(space.blocks, choices, strict=True):
        output = output_of(model, block)
        widths = torch.tensor(block.widths)[chosen][..., None]
        rows = inputs_of(output) // block.full

        def on_units(module, inputs, widths=widths, rows=rows):
            return (inputs[0] * (torch.arange(inputs[0].shape[-1]) < widths * rows),)

        output.register_forward_pre_hook(on_units)
        output.register_forward_hook(lambda module, inputs, result, widths=widths: result * (widths > 0))
    return model


def gradients_of(model, tokens):
    model.zero_grad()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    # a block that no token uses has no gradient at all
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def test_tokens_are_sorted_by_falling_width_and_counted():
    choices = torch.tensor([[0, 3, 1], [1, 0, 3]])
    groups, counts = group((0, 2, 5, 9), choices)
    assert counts == [2, 2, 0, 2]
    assert groups.order.tolist() == [1, 5, 2, 3]
    assert groups.bands == (Band(0, 2, 4), Band(2, 9, 2))
    assert groups.units == 9
    real = torch.tensor([[True, False, True], [True, True, True]])
    groups, counts = group((0, 2, 5, 9), choices, real)
    assert counts == [2, 2, 0, 1]
    assert groups.order.tolist() == [5, 2, 3]
    assert groups.bands == (Band(0, 2, 3), Band(2, 9, 1))


def test_tokens_that_take_the_same_width_stay_where_they_are():
    for choices in (torch.full((2, 3), 2), torch.tensor([[2]])):
        groups, counts = group((0, 2, 5, 9), choices)
        assert groups.order is None
        assert groups.bands == (Band(0, 5, choices.numel()),)
        assert counts == [0, 0, choices.numel(), 0]
    groups, _ = group((0, 2, 5, 9), torch.zeros(2, 3, dtype=torch.int64))
    assert groups.bands == ()
    # padding uses nothing, so real tokens have to be told from it
    groups, counts = group((2, 5), torch.tensor([[1, 1, 1]]), torch.tensor([[False, True, True]]))
    assert groups.order.tolist() == [1, 2]
    assert counts == [0, 2]


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_grouped_equals_masked(model, attention, tokens, generator):
    dense, backbone = elastic_pair(with_attention(model, attention))
    space = backbone.space
    outputs = []
    for name in MIXTURES:
        policy = Fixed(mixture(name, space, tokens.shape, generator))
        with backbone.use(policy):
            outputs.append(backbone.model(tokens, use_cache=False).logits)
        expected = masked(dense, space, policy.choices)(tokens, use_cache=False).logits
        torch.testing.assert_close(outputs[-1], expected, **TOLERANCE)
        for block, chosen in enumerate(policy.choices):
            assert policy.counts[block] == [int((chosen == c).sum()) for c in range(len(space.blocks[block].widths))]
    # and one mixture is not another
    assert all((one - other).abs().max() > WRONG for one, other in pairwise(outputs))


@pytest.mark.parametrize("attention", ATTENTION)
def test_gradients_equal_those_of_the_masked_model(model, attention, tokens, generator):
    dense, backbone = elastic_pair(with_attention(model, attention))
    seen = []
    for name in MIXTURES:
        policy = Fixed(mixture(name, backbone.space, tokens.shape, generator))
        with backbone.use(policy):
            seen.append(gradients_of(backbone.model, tokens))
        expected = gradients_of(masked(dense, backbone.space, policy.choices), tokens)
        for parameter, value in expected.items():
            torch.testing.assert_close(seen[-1][parameter], value, **TOLERANCE)
    assert max((seen[0][n] - seen[1][n]).abs().max() for n in seen[0]) > WRONG


@torch.no_grad()
def test_a_pass_of_one_token(model, generator):
    dense, backbone = elastic_pair(model)
    token = torch.tensor([[7]])
    for name in MIXTURES:
        policy = Fixed(mixture(name, backbone.space, token.shape, generator))
        with backbone.use(policy):
            found = backbone.model(token).logits
        expected = masked(dense, backbone.space, policy.choices)(token).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_computes_the_same(family, tokens, generator):
    _, backbone = elastic_pair(MODELS[family]())
    choices = mixture("random", backbone.space, tokens.shape, generator)
    found = []
    for device in ("cpu", "cuda"):
        backbone.model.to(device)
        ids = tokens.to(device)
        with backbone.use(Fixed([c.to(device) for c in choices])):
            values = {"logits": backbone.model(ids, use_cache=False).logits, **gradients_of(backbone.model, ids)}
        # moving a model moves its gradients too
        found.append({name: value.detach().to("cpu", copy=True) for name, value in values.items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)


def matrices_of(backbone):
    """Matrices of an MLP: a gated one has three."""
    return sum(parameter.dim() == 2 for parameter in backbone.blocks[1].module.parameters())


def rolled(groups):
    return replace(groups, order=groups.order.roll(1))


def with_edge_moved(groups):
    first, second, *rest = groups.bands
    return replace(groups, bands=(replace(first, stop=first.stop - 1), replace(second, start=first.stop - 1), *rest))


def with_a_row_less(groups):
    *rest, last = groups.bands
    return replace(groups, bands=(*rest, replace(last, rows=last.rows - 1)))


@pytest.mark.parametrize("spoil", [rolled, with_edge_moved, with_a_row_less])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_wrong_order_or_band_is_seen(family, spoil, tokens, generator, monkeypatch):
    dense, backbone = elastic_pair(MODELS[family]())
    policy = Fixed(mixture("wide", backbone.space, tokens.shape, generator))
    expected = masked(dense, backbone.space, policy.choices)(tokens).logits

    def spoiled(*arguments):
        groups, counts = group(*arguments)
        return spoil(groups), counts

    monkeypatch.setattr("flextron_lit.elastic.selection.group", spoiled)
    with backbone.use(policy):
        assert (backbone.model(tokens).logits - expected).abs().max() > WRONG


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_it_is_the_masked_model_up_to_rounding(family, tokens, generator):
    dense, backbone = elastic_pair(MODELS[family]())
    policy = Fixed(mixture("random", backbone.space, tokens.shape, generator))
    reference = masked(dense, backbone.space, policy.choices)
    logits = []
    with torch.autocast("cpu", torch.bfloat16), backbone.use(policy):
        for model in (backbone.model, reference):
            logits.append(model(tokens, use_cache=False).logits)
    exact = reference(tokens, use_cache=False).logits
    error, allowed = ((found - exact).abs().mean() for found in logits)
    assert error < 2 * allowed
    logits[0].float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.model.parameters())


def products(run):
    """Multiply-adds of matrix products in a run, those between queries, keys and values left out."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    counts = counter.get_flop_counts()["Global"]
    # sdpa on a CPU is no such product, so a batched one is a projection of heads that lie apart
    counted = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.baddbmm)
    return sum(counts.get(op, 0) for op in counted) // 2


@pytest.mark.parametrize("mix", MIXTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_unit_is_computed_for_a_token_that_does_not_use_it(family, mix, tokens, generator):
    _, backbone = elastic_pair(MODELS[family]())
    model, space = backbone.model, backbone.space
    head_dim = backbone.blocks[0].head_dim
    policy = Fixed(mixture(mix, space, tokens.shape, generator))
    used = {"attention": 0, "mlp": 0}
    for block, chosen in zip(space.blocks, policy.choices, strict=True):
        used[block.kind] += int(torch.tensor(block.widths)[chosen].sum())
    heads = backbone.blocks[0].heads_per_unit
    keys_values = 2 * tokens.numel() * space.blocks[0].full * head_dim * len(space.blocks) // 2
    matrices = matrices_of(backbone)
    own = 32 * (used["mlp"] * matrices + used["attention"] * heads * head_dim * 2 + keys_values)
    with backbone.use(policy):
        head = 32 * model.config.vocab_size * tokens.numel()
        assert products(lambda: model(tokens, use_cache=False)) == own + head


class Operations(TorchDispatchMode):
    """Counts the tensor operations inside it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_many_tokens_take_no_more_operations_than_few(family):
    _, backbone = elastic_pair(MODELS[family]())
    counts = []
    for length in (8, 64):
        tokens = torch.arange(length)[None] % 61
        # every choice is taken, so the bands are the same
        choices = [torch.arange(length)[None] % len(block.widths) for block in backbone.space.blocks]
        with backbone.use(Fixed(choices)), Operations() as operations:
            backbone.model(tokens, use_cache=False)
        counts.append(operations.count)
    assert counts[0] == counts[1]


def left_padded(sequences):
    """(input_ids, attention_mask, position_ids) of sequences of several lengths."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.stack([F.pad(sequence, (length - len(sequence), 0)) for sequence in sequences])
    mask = torch.stack([F.pad(torch.ones_like(sequence), (length - len(sequence), 0)) for sequence in sequences])
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_padding_changes_nothing_and_counts_nowhere(model, attention, tokens):
    _, backbone = elastic_pair(with_attention(model, attention))
    sequences = [tokens[0, :11], tokens[1]]
    ids, mask, positions = left_padded(sequences)
    padded, alone, unmasked = (Linear(backbone.space) for _ in range(3))
    with backbone.use(padded):
        together = backbone.model(ids, attention_mask=mask, position_ids=positions).logits
    with backbone.use(alone):
        for row, sequence in enumerate(sequences):
            own = backbone.model(sequence[None]).logits[0]
            torch.testing.assert_close(together[row, -len(sequence) :], own, **TOLERANCE)
    assert padded.counts == alone.counts
    assert all(sum(counts) == mask.sum() for counts in padded.counts.values())
    assert padded.passes[0].equal(mask.bool())
    assert alone.passes == [None, None]
    with backbone.use(unmasked):
        backbone.model(ids, position_ids=positions)
    assert all(sum(counts) == mask.numel() for counts in unmasked.counts.values())


@torch.no_grad()
def test_gradients_do_not_reach_padding(tokens):
    _, backbone = elastic_pair(MODELS["gpt2"]())
    ids, mask, _ = left_padded([tokens[0, :11], tokens[1]])
    embedded = backbone.model.get_input_embeddings()(ids)
    with torch.enable_grad(), backbone.use(Linear(backbone.space)):
        embedded.requires_grad_()
        logits = backbone.model(inputs_embeds=embedded, attention_mask=mask).logits
        (logits * mask[..., None]).sum().backward()
    reached = embedded.grad.abs().sum(-1) > 0
    assert reached.equal(mask.bool())


@pytest.mark.parametrize("make_cache", [DynamicCache, lambda config: StaticCache(config=config, max_cache_len=32)])
@pytest.mark.parametrize("attention", ATTENTION)
@torch.no_grad()
def test_token_by_token_equals_the_whole_sequence(model, attention, make_cache, tokens):
    _, backbone = elastic_pair(with_attention(model, attention))
    whole, other = Linear(backbone.space), Linear(backbone.space, seed=1)
    with backbone.use(whole):
        expected = backbone.model(tokens, use_cache=False).logits
    with backbone.use(other):
        assert (backbone.model(tokens, use_cache=False).logits - expected).abs().max() > WRONG
    for sizes in ([1] * tokens.shape[1], [12] + [1] * 7, [7, 9, 3]):
        steps, cache = Linear(backbone.space), make_cache(config=backbone.model.config)
        with backbone.use(steps):
            parts = [backbone.model(part, past_key_values=cache).logits for part in tokens.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), expected, **TOLERANCE)
        assert steps.counts == whole.counts
    assert sum(count > 0 for counts in whole.counts.values() for count in counts) > len(whole.counts)


def test_a_cache_that_held_only_a_tokens_own_groups_would_be_seen(tokens, monkeypatch):
    """Control: why keys and values are those of all groups."""
    _, backbone = elastic_pair(MODELS["llama-gqa"]())
    with torch.no_grad(), backbone.use(Linear(backbone.space)):
        expected = backbone.model(tokens, use_cache=False).logits
        update = DynamicCache.update

        def narrow(self, key, value, layer, *rest):
            return update(self, key, value * (torch.arange(key.shape[1]) < 2)[:, None, None], layer, *rest)

        monkeypatch.setattr(DynamicCache, "update", narrow)
        cache = DynamicCache(config=backbone.model.config)
        parts = [backbone.model(part, past_key_values=cache).logits for part in tokens.split(1, 1)]
    assert (torch.cat(parts, 1) - expected).abs().max() > WRONG


@pytest.mark.parametrize("attention", ATTENTION)
def test_cached_generation_equals_uncached(model, attention, tokens):
    _, backbone = elastic_pair(with_attention(model, attention))
    ids, mask, _ = left_padded([tokens[0, :11], tokens[1]])
    settings = {"max_new_tokens": 10, "do_sample": False}
    policy = Linear(backbone.space)
    with backbone.use(policy):
        cached = backbone.model.generate(ids, attention_mask=mask, **settings)
        assert all(sum(counts) == mask.sum() + 2 * 9 for counts in policy.counts.values())
        uncached = backbone.model.generate(ids, attention_mask=mask, use_cache=False, **settings)
        static = backbone.model.generate(ids, attention_mask=mask, cache_implementation="static", **settings)
        alone = backbone.model.generate(tokens[:1, :11], attention_mask=mask[1:, :11], **settings)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, static)
    assert torch.equal(cached[:1, -10:], alone[:, -10:])
    full = backbone.model.generate(ids, attention_mask=mask, **settings)
    assert not torch.equal(cached, full)


def test_activation_checkpointing_gives_the_same_gradients(model, tokens):
    plain, checkpointed = (ElasticBackbone(copy.deepcopy(model), space_for(model)) for _ in range(2))
    checkpointed.enable_activation_checkpointing()
    ids, mask, _ = left_padded([tokens[0, :11], tokens[1]])
    gradients = []
    for backbone, seed in ((plain, 0), (checkpointed, 0), (plain, 1)):
        policy = Linear(backbone.space, seed)
        backbone.model.train().zero_grad()
        with backbone.use(policy):
            loss = backbone.model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
            counted = copy.deepcopy(policy.counts)
            loss.backward()
        # blocks are recomputed in the checkpointed model alone
        assert (policy.counts != counted) == (backbone is checkpointed)
        gradients.append({n: p.grad for n, p in backbone.model.named_parameters() if p.grad is not None})
    one, same, other = gradients
    assert one.keys() == same.keys()
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_extraction_and_undo_while_a_policy_is_active(family, tokens):
    dense, backbone = elastic_pair(MODELS[family]())
    policy = Linear(backbone.space)
    backbone.selection.set(policy)
    routed = backbone.model(tokens).logits
    sub_network = SubNetwork((1, 2, 2, 1, 1, 3))
    small = extract(backbone, sub_network)
    assert type(small.base_model) is type(dense.base_model) is not type(backbone.model.base_model)
    assert backbone.selection.current is policy
    assert torch.equal(backbone.model(tokens).logits, routed)
    seen = len(policy.passes)
    with backbone.use(sub_network):
        torch.testing.assert_close(small(tokens).logits, backbone.model(tokens).logits, **TOLERANCE)
    assert len(policy.passes) == seen == 2
    restored = backbone.undo()
    assert type(restored.base_model) is type(dense.base_model)
    assert torch.equal(restored(tokens).logits, dense(tokens).logits)
    assert len(policy.passes) == 2


@torch.no_grad()
def test_use_gives_an_outer_policy_its_turn_back(tokens, backbone):
    outer, inner = Linear(backbone.space), Linear(backbone.space, seed=1)
    with backbone.use(outer):
        before = backbone.model(tokens).logits
        with backbone.use(inner):
            assert not torch.equal(backbone.model(tokens).logits, before)
        with backbone.use(backbone.space.smallest()):
            backbone.model(tokens)
        with pytest.raises(KeyError), backbone.use(inner):
            raise KeyError
        assert torch.equal(backbone.model(tokens).logits, before)
    assert (len(outer.passes), len(inner.passes)) == (2, 1)


@torch.no_grad()
def test_a_copy_made_while_a_policy_is_active_has_its_own(tokens, backbone):
    policy = Linear(backbone.space)
    with backbone.use(policy):
        expected = backbone.model(tokens).logits
        copied = copy.deepcopy(backbone.model)
    passes, counts = len(policy.passes), copy.deepcopy(policy.counts)
    assert torch.equal(copied(tokens).logits, expected)
    assert (len(policy.passes), policy.counts) == (passes, counts)
    own = copied.model.layers[0].mlp.elastic.selection
    assert own is copied.model.elastic is not backbone.selection
    assert len(own.current.passes) == 2
    own.set(backbone.space.full())
    assert torch.equal(copied(tokens).logits, backbone.model(tokens).logits)
