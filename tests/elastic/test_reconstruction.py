"""Order and compensation in closed form: against the numbers they promise, and everywhere that widths are used."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from flextron_lit.elastic import ElasticBackbone, extract
from flextron_lit.elastic.compensation import MOST_PROJECTIONS, Compensation, anchors, shapes
from flextron_lit.elastic.fisher import output_gradients
from flextron_lit.elastic.importance import falling_order, measure
from flextron_lit.elastic.least_squares import excess_loss, greedy_order, own_projection, rows_of, unit_scales
from flextron_lit.elastic.reconstruction import compensate, prepare, rebuild, reconstruct
from flextron_lit.elastic.unit_gates import for_all_tokens, gated
from flextron_lit.space import SpaceConfig, SubNetwork
from tests import options
from tests.conftest import elastic_pair, make_gpt2, make_llama, space_for, with_compensation
from tests.elastic.test_families import TOLERANCE, WRONG, output_of, some_sub_networks
from tests.elastic.test_grouping import Fixed, mixture


def moments(units, rows=1, hidden_size=12, tokens=400):
    """What correlated units say, and a projection that reads them, in float64."""
    generator = torch.Generator().manual_seed(options.seed(3))
    mixed = torch.randn(units * rows, units * rows, generator=generator, dtype=torch.float64)
    read = torch.randn(tokens, units * rows, generator=generator, dtype=torch.float64) @ mixed
    projection = torch.randn(hidden_size, units * rows, generator=generator, dtype=torch.float64)
    return read, read.T @ read / tokens, projection


def missed(read, projection, narrow):
    """Mean square of what a narrower projection of the first columns misses."""
    return float((read @ projection.T - read[:, : narrow.shape[1]] @ narrow.T).square().sum(1).mean())


# --- the formulas -----------------------------------------------------------------------------------------------


def test_an_own_projection_is_the_least_squares_solution():
    read, gram, projection = moments(10)
    own = own_projection(gram, projection, 6, ridge=0.0)
    best = torch.linalg.lstsq(read[:, :6], read @ projection.T).solution.T
    torch.testing.assert_close(own, best)
    # the ridge draws towards the projection's own columns, and costs on the text that it was solved on
    held = own_projection(gram, projection, 6, ridge=0.1)
    assert (held - projection[:, :6]).norm() < (own - projection[:, :6]).norm()
    assert missed(read, projection, own) < missed(read, projection, held) < missed(read, projection, projection[:, :6])


@pytest.mark.parametrize("rows", [1, 3])
def test_the_greedy_order_takes_the_unit_that_helps_most(rows):
    read, gram, projection = moments(7, rows)
    order = greedy_order(gram, projection, 7, picks=3, ridge=0.0).tolist()
    assert sorted(order) == list(range(7))

    def left(units):
        where = rows_of(torch.tensor(units), rows)
        solved = torch.linalg.lstsq(read[:, where], read @ projection.T).solution
        return float((read @ projection.T - read[:, where] @ solved).square().sum())

    best = min(range(7), key=lambda unit: left([unit]))
    assert order[0] == best or rows == 1
    if rows > 1:
        second = min((u for u in range(7) if u != best), key=lambda unit: left([best, unit]))
        assert order[:2] == [best, second]


def test_neurons_are_picked_many_at_a_time_and_never_twice():
    _, gram, projection = moments(50)
    order = greedy_order(gram, projection, 50, picks=40)
    assert order.sort().values.tolist() == list(range(50))
    # a unit that says nothing, and a copy of another one, help least
    gram[7] = gram[:, 7] = 0.0
    assert greedy_order(gram, projection, 50, picks=49).tolist()[-1] == 7


@pytest.mark.parametrize("rows", [1, 3])
def test_scales_are_the_best_factors(rows):
    read, gram, projection = moments(8, rows)
    scales = unit_scales(gram, projection, projection, 5, rows, ridge=0.0)
    first = read[:, : 5 * rows].unflatten(1, (5, rows))
    parts = first.unsqueeze(-1) * projection.T[: 5 * rows].unflatten(0, (5, rows))
    added = parts.sum(2).transpose(1, 2).flatten(0, 1)  # [tokens x D, units]
    best = torch.linalg.lstsq(added, (read @ projection.T).flatten()[:, None]).solution[:, 0]
    torch.testing.assert_close(scales, best)
    assert not torch.allclose(scales, torch.ones(5, dtype=torch.float64), atol=0.05)


def test_the_excess_loss_is_half_of_what_the_gradients_see_of_the_error():
    read, gram, projection = moments(8)
    gradients = torch.randn(300, 12, generator=torch.Generator().manual_seed(options.seed(0)), dtype=torch.float64)
    fisher = gradients.T @ gradients / 300
    errors = read @ projection.T - read[:, :4] @ projection[:, :4].T
    expected = (fisher * (errors.T @ errors / len(errors))).sum() / 2
    torch.testing.assert_close(excess_loss(gram, projection, projection[:, :4], fisher), float(expected))
    assert excess_loss(gram, projection, projection, fisher) == 0
    # a block that is skipped misses all of it
    assert excess_loss(gram, projection, projection[:, :0], fisher) > 0


def test_blocks_with_many_widths_share_projections():
    assert anchors((1, 2, 3), "own") == [1, 2]
    assert anchors((0, 1, 2, 3), "own") == [1, 2]
    assert anchors((1, 2, 3), "scales") == anchors((1, 2, 3), "none") == []
    many = anchors(tuple(range(1, 13)), "own")
    assert len(many) == MOST_PROJECTIONS
    assert many[-1] == 11
    named = shapes(tuple(range(13)), 2, 5, "own")
    assert named["projections.11"] == (5, 22)
    assert len(named) == 11
    assert shapes((1, 2), 2, 5, "none") == {}


def test_gradients_at_outputs_are_those_of_the_loss(tokens):
    """Labels are drawn, so that the mean over many draws is the model's own Fisher information."""
    backbone = ElasticBackbone(make_llama(), space_for(make_llama()))
    generator = torch.Generator().manual_seed(options.seed(0))
    found = output_gradients(backbone, 200 * [{"input_ids": tokens[:1, :6]}], generator)
    # exactly: over all words at the last position, for the last block, where no other position takes part
    elastic = backbone.blocks[-1]
    kept = {}
    hook = elastic.output.register_forward_hook(lambda _, inputs, output: kept.update(output=output))
    logits = backbone.model(tokens[:1, :6], use_cache=False).logits[0]
    hook.remove()
    expected = torch.zeros(32, 32)
    for position in range(6):
        for word, share in enumerate(logits[position].softmax(-1).tolist()):
            loss = F.cross_entropy(logits[position], torch.tensor(word))
            (gradient,) = torch.autograd.grad(loss, kept["output"], retain_graph=True)
            expected += share * torch.outer(gradient[0, position], gradient[0, position]) / 6
    assert (found[-1] - expected).norm() < 0.2 * expected.norm()
    assert (found[0] - expected).norm() > 0.2 * expected.norm()
    assert all(parameter.grad is None for parameter in backbone.model.parameters())


# --- a network that has them ------------------------------------------------------------------------------------


@pytest.fixture(params=["own", "scales", "shared"])
def compensated(request, model):
    """A dense model and its elastic network, whose narrower widths have something of their own."""
    space = space_for(model)
    if request.param == "shared":
        # more widths than projections
        space = SpaceConfig(mlp=[0, 8, 16, 24, 32, 48, 64], attention=space.attention)
    dense, backbone = copy.deepcopy(model), ElasticBackbone(copy.deepcopy(model), space)
    form = "scales" if request.param == "scales" else "own"
    with_compensation(backbone, form)
    return dense, backbone


def folded(dense, backbone, sub_network):
    """Reference: a dense model with each block's own projection in the place of its columns, and units cut off."""
    model = copy.deepcopy(dense)
    for elastic, width in zip(backbone.blocks, backbone.space.widths(sub_network), strict=True):
        output, block = output_of(model, elastic.block), elastic.block
        transposed = hasattr(output, "nx")
        weight = output.weight.t() if transposed else output.weight
        rows = weight.shape[1] // block.full
        own = weight.detach().clone()
        if 0 < width < block.full:
            compensation = dict(elastic.compensation.named_parameters())
            wider = [int(n.split(".")[1]) for n in compensation if n.startswith("projections")]
            anchor = min((w for w in wider if w >= width), default=None)
            own[:, width * rows :] = 0
            if anchor is not None:
                own[:, : width * rows] = compensation[f"projections.{anchor}"][:, : width * rows]
            if f"scales.{width}" in compensation:
                own[:, : width * rows] *= compensation[f"scales.{width}"].repeat_interleave(rows)
        output.weight.data = own.t().contiguous() if transposed else own
        if width == 0:
            output.register_forward_hook(lambda module, inputs, result: result * 0)
    return model


@torch.no_grad()
def test_full_width_is_the_dense_model_to_the_last_bit(compensated, tokens):
    dense, backbone = compensated
    assert torch.equal(backbone.model(tokens).logits, dense(tokens).logits)
    with backbone.use(backbone.space.uniform(0.5, 0.5)):
        assert not torch.equal(backbone.model(tokens).logits, dense(tokens).logits)


@torch.no_grad()
def test_sliced_equals_folded_equals_extracted(compensated, tokens, generator):
    dense, backbone = compensated
    plain = ElasticBackbone(copy.deepcopy(dense), backbone.space)
    for sub_network in some_sub_networks(backbone.space, generator, 4):
        with backbone.use(sub_network):
            sliced = backbone.model(tokens).logits
        torch.testing.assert_close(sliced, folded(dense, backbone, sub_network)(tokens).logits, **TOLERANCE)
        extracted = extract(backbone, sub_network)
        torch.testing.assert_close(sliced, extracted(tokens).logits, **TOLERANCE)
        assert not any("compensation" in name for name in extracted.state_dict())
        # the control: without what the widths have of their own it is another network
        widths = zip(backbone.blocks, backbone.space.widths(sub_network), strict=True)
        narrower = any(0 < width < elastic.block.full for elastic, width in widths)
        with plain.use(sub_network):
            apart = (plain.model(tokens).logits - sliced).abs().max()
        assert (apart > WRONG) == narrower


@torch.no_grad()
@pytest.mark.parametrize("mix", ["random", "uneven", "alike 1", "alike 0"])
def test_every_token_is_read_by_its_own_width(compensated, mix, tokens, generator):
    dense, backbone = compensated
    choices = mixture(mix, backbone.space, tokens.shape, generator)
    with backbone.use(Fixed(choices)):
        grouped = backbone.model(tokens, use_cache=False).logits
    # the reference computes every unit, and mixes the widths' readings token by token
    one_hot = [F.one_hot(own, backbone.space.num_choices).float() for own in choices]
    with gated(backbone, lambda block, _: one_hot[block]):
        expected = backbone.model(tokens, use_cache=False).logits
    torch.testing.assert_close(grouped, expected, **TOLERANCE)
    bare = ElasticBackbone(copy.deepcopy(dense), backbone.space)
    with bare.use(Fixed(choices)):
        apart = (bare.model(tokens, use_cache=False).logits - grouped).abs().max()
    # also where all others skip: the first layer cannot
    assert apart > WRONG


@torch.no_grad()
def test_one_hot_gates_give_what_the_sub_network_gives(compensated, tokens, generator):
    _, backbone = compensated
    for sub_network in some_sub_networks(backbone.space, generator, 3):
        with gated(backbone, for_all_tokens(backbone.space.one_hot(sub_network))):
            found = backbone.model(tokens, use_cache=False).logits
        choices = [torch.full(tokens.shape, choice) for choice in sub_network.choices]
        with backbone.use(Fixed(choices)):
            expected = backbone.model(tokens, use_cache=False).logits
        torch.testing.assert_close(found, expected, **TOLERANCE)
        with gated(backbone, for_all_tokens(backbone.space.one_hot(backbone.space.uniform(0.5, 0.5)))):
            other = backbone.model(tokens, use_cache=False).logits
        assert sub_network == backbone.space.uniform(0.5, 0.5) or (other - expected).abs().max() > WRONG


def test_what_was_not_drawn_gets_no_gradient_and_no_update(compensated, tokens):
    _, backbone = compensated
    drawn = SubNetwork(tuple(2 for _ in backbone.blocks))
    before = {name: p.detach().clone() for name, p in backbone.compensations.items()}
    optimizer = torch.optim.AdamW(backbone.model.parameters(), lr=0.1, weight_decay=0.1)
    with backbone.use(drawn):
        backbone.model(tokens, labels=tokens, use_cache=False).loss.backward()
    with backbone.use(backbone.space.full()):
        backbone.model(tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    widths = {f".{e.block.widths[2]}" for e in backbone.blocks}
    moved = {name for name, p in backbone.compensations.items() if not torch.equal(p, before[name])}
    assert moved
    assert all(backbone.compensations[name].grad is None for name in before.keys() - moved)
    # of a width that shares a projection, that and its own factors
    assert any(name.endswith(tuple(widths)) for name in moved)


def test_undo_leaves_nothing_behind_and_saving_writes_a_stock_checkpoint(compensated, tokens, tmp_path):
    dense, backbone = compensated
    backbone.model.save_pretrained(tmp_path)
    assert not any("compensation" in name for name in load_file(tmp_path / "model.safetensors"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, dense(tokens).logits)
    assert backbone.compensations
    restored = backbone.undo()
    assert restored.state_dict().keys() == dense.state_dict().keys()
    assert torch.equal(restored(tokens).logits, dense(tokens).logits)


def test_a_compensation_of_another_model_is_refused():
    backbone = ElasticBackbone(make_llama(), SpaceConfig(mlp=[16, 64]))
    with pytest.raises(ValueError, match="made for another model"):
        compensate(backbone, [{"projections.1": torch.zeros(32, 7)}, *({} for _ in backbone.blocks[1:])])
    with pytest.raises(ValueError, match="below the full one"):
        compensate(backbone, [{}, {"projections.64": torch.zeros(32, 64)}, *({} for _ in backbone.blocks[2:])])
    assert not backbone.compensations


# --- the pass over a text ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_reconstruction_comes_nearer_to_the_full_network(make, generator):
    """At every single block and width, on the text that it was solved on: by construction of least squares."""
    text = {"input_ids": torch.randint(1, 61, (8, 24), generator=generator)}
    dense, plain = elastic_pair(make())
    order = falling_order(measure(plain, [text]))
    for form, orders in (("none", order), ("scales", order), ("own", order), ("own", None)):
        backbone = ElasticBackbone(copy.deepcopy(dense), space_for(dense))
        found = reconstruct(backbone, text, orders, form)
        assert torch.equal(backbone.model(**text).logits, dense(**text).logits)
        rebuild(backbone, found)
        torch.testing.assert_close(backbone.model(**text).logits, dense(**text).logits, **TOLERANCE)
        errors = [block_error(backbone, text, index) for index in range(len(backbone.blocks))]
        if form == "none":
            before = errors
        elif orders is order:
            pairs = [pair for now, then in zip(errors, before, strict=True) for pair in zip(now, then, strict=True)]
            assert all(own < 1.001 * other for own, other in pairs)
            assert sum(map(sum, errors)) < sum(map(sum, before))
            before = errors


@torch.no_grad()
def block_error(backbone, text, index):
    """Mean square of what each narrower width of a block misses of its full output, all others at full width."""
    elastic, kept = backbone.blocks[index], []
    hook = elastic.output.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    backbone.model(**text)
    hook.remove()
    full = kept[0] @ elastic.outgoing
    narrow = [w for w in elastic.block.widths[:-1] if w]
    weights = [elastic.compensation.folded(elastic.outgoing.t(), w, w * elastic.rows) for w in narrow]
    return [float((full - kept[0][..., : w.shape[1]] @ w.t()).square().mean()) for w in weights]


def test_every_block_is_reconstructed_on_its_own_clean_inputs(tokens):
    """The whole pass sees the dense network: what is found does not depend on what was found for the blocks before."""
    backbone = ElasticBackbone(make_llama(), space_for(make_llama()))
    fisher = output_gradients(backbone, [{"input_ids": tokens}], torch.Generator().manual_seed(0))
    found = reconstruct(backbone, {"input_ids": tokens}, None, "own", fisher)
    again = reconstruct(backbone, {"input_ids": tokens}, None, "own", fisher)
    assert all(torch.equal(a.order, b.order) and a.excess == b.excess for a, b in zip(found, again, strict=True))
    for each, elastic in zip(found, backbone.blocks, strict=True):
        assert each.excess[-1] == 0
        assert all(value > 0 for value in each.excess[:-1])
        assert len(each.excess) == len(elastic.block.widths)
    assert not backbone.compensations
    prepare(backbone, "own")
    assert {n: list(p.shape) for n, p in backbone.blocks[1].compensation.named_parameters()} == {
        n: list(t.shape) for n, t in found[1].compensation.items()
    }


def test_an_empty_compensation_has_nothing():
    assert Compensation().empty
    assert not Compensation({"scales.2": torch.ones(2)}).empty
