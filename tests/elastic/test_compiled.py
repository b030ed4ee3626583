"""Compiled widths: layers taken apart into branches compute what they did, in passes of every kind."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from flextron_lit.elastic import extract
from flextron_lit.elastic.compiled import branch, packages, recorded_steps, widths, with_gradients
from flextron_lit.elastic.compiled.recorded_steps import RecordedSteps
from flextron_lit.space import SubNetwork
from tests.conftest import MODELS, elastic_pair, make_gpt2, make_llama, with_compensation

TOLERANCE = 1e-4
# a control must be wrong by far more than that
WRONG = 1e-3
ROOM = 24
ALWAYS = {"llama-gqa", "gpt-neox"}


def compiled(backbone):
    """The same, its layers taken apart."""
    backbone.compile_widths()
    return backbone


@torch.no_grad()
def passes(backbone, tokens, mask=None):
    """Logits of a prompt and of two tokens after it, one by one, and of all without a cache."""
    cache = StaticCache(config=backbone.model.config, max_cache_len=ROOM)
    ends = tokens.shape[1] - 2, tokens.shape[1] - 1, tokens.shape[1]
    found, begin = [], 0
    for end in ends:
        given = {} if mask is None else {"attention_mask": mask[:, :end]}
        found.append(backbone.model(tokens[:, begin:end], past_key_values=cache, use_cache=True, **given).logits)
        begin = end
    return [*found, backbone.model(tokens, attention_mask=mask, use_cache=False).logits]


def differ(found, expected):
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


def slides(model):
    return getattr(model.config, "sliding_window", None) is not None


@pytest.fixture(params=[pytest.param(name, marks=() if name in ALWAYS else pytest.mark.matrix) for name in MODELS])
def model(request):
    """A dense model of every family; of two always, since a graph takes half a second."""
    return MODELS[request.param]()


def test_compiled_passes_are_those_of_the_network(model, tokens, as_traced):
    plain, taken_apart = (with_compensation(elastic_pair(model)[1]) for _ in range(2))
    compiled(taken_apart)
    # layer by layer: full, half and a quarter, nothing of one kind
    sub_network = SubNetwork((2, 3, 2, 1, 1, 0))
    with plain.use(sub_network), taken_apart.use(sub_network):
        assert differ(passes(taken_apart, tokens), passes(plain, tokens)) < TOLERANCE
        # the second time nothing is compiled
        count = len(taken_apart.compiled.compilations)
        assert differ(passes(taken_apart, tokens), passes(plain, tokens)) < TOLERANCE
    assert 0 < count == len(taken_apart.compiled.compilations)
    assert bool(taken_apart.compiled.eager) == slides(model)


@pytest.fixture
def backbone(as_traced):
    return compiled(with_compensation(elastic_pair(make_llama())[1]))


def expected_of(backbone, sub_network, *args):
    """What the network computes as it is."""
    backbone.compile_widths(False)
    with backbone.use(sub_network):
        found = passes(backbone, *args)
    compiled(backbone)
    return found


def test_padding_is_left_out(backbone, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    # of what was padding nothing is asked
    real = [mask[:, :-2] > 0, mask[:, -2:-1] > 0, mask[:, -1:] > 0, mask > 0]

    def wanted(found):
        return [logits[where] for logits, where in zip(found, real, strict=True)]

    half = backbone.space.uniform(0.5, 0.5)
    expected = wanted(expected_of(backbone, half, tokens, mask))
    with backbone.use(half):
        assert differ(wanted(passes(backbone, tokens, mask)), expected) < TOLERANCE
        assert differ(wanted(passes(backbone, tokens)), expected) > WRONG


def test_layers_that_are_alike_share_what_is_compiled(backbone, tokens, generator):
    space = backbone.space
    for _ in range(6):
        with backbone.use(space.random(generator)):
            passes(backbone, tokens)
    rows = backbone.compiled.compilations
    kinds = {(row.block.split(".")[-1], row.width, row.phase) for row in rows}
    # passes with a static cache and without are two graphs of an attention, and one of an MLP
    without_cache = {kind for kind in kinds if kind[0] == "attention" and kind[2] == "prefill"}
    assert len(rows) == len(kinds) + len(without_cache)
    assert not backbone.compiled.eager


def test_layers_that_are_not_alike_share_nothing(tokens, as_traced, nothing_kept, monkeypatch):
    _, backbone = elastic_pair(MODELS["gpt2-scaled"]())
    full = backbone.space.full()
    expected = expected_of(backbone, full, tokens)
    assert differ(passes(compiled(backbone), tokens), expected) < TOLERANCE
    scales = {row.block for row in backbone.compiled.compilations}
    assert {f"layers.{i}.attention" for i in range(3)} <= scales
    monkeypatch.setattr(widths, "structure", type)
    assert differ(passes(compiled(backbone), tokens), expected) > WRONG


def test_weights_are_read_at_every_pass(backbone, tokens):
    half = backbone.space.uniform(0.5, 0.5)
    with backbone.use(half):
        before = passes(backbone, tokens)
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "compensation" in name or "norm" in name or "q_proj" in name:
                parameter.mul_(1.5)
    with backbone.use(half):
        after = passes(backbone, tokens)
    assert differ(after, expected_of(backbone, half, tokens)) < TOLERANCE
    assert differ(after, before) > WRONG
    # another type of numbers is another graph
    backbone.model.to(torch.float64)
    with backbone.use(half):
        assert differ(passes(backbone, tokens), after) < 1e-3


def test_what_is_put_on_a_layer_later_is_not_passed_by(backbone, tokens, caplog):
    before = passes(backbone, tokens)
    seen = []
    layers = backbone.layers
    handles = [
        layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append("projection")),
        layers[1].self_attn.register_forward_hook(lambda *_: seen.append("block")),
        layers[2].input_layernorm.register_forward_hook(lambda *_: seen.append("norm")),
        layers[2].mlp.act_fn.register_forward_hook(lambda *_: seen.append("activation")),
        layers[2].register_forward_hook(lambda *_: seen.append("layer")),
    ]
    assert differ(passes(backbone, tokens), before) < TOLERANCE
    assert "not compiled: layers that something was put on" in caplog.text
    assert set(seen) == {"projection", "block", "norm", "activation", "layer"}
    for handle in handles:
        handle.remove()
    noted = backbone.compiled.eager.total()
    passes(backbone, tokens)
    assert backbone.compiled.eager.total() == noted
    norm, layers[1].input_layernorm = layers[1].input_layernorm, copy.deepcopy(layers[1].input_layernorm)
    layers[1].input_layernorm.weight.data.zero_()
    assert differ(passes(backbone, tokens), before) > WRONG
    layers[1].input_layernorm = norm
    noted = backbone.compiled.eager.total()
    passes(backbone, tokens)
    assert backbone.compiled.eager.total() == noted
    layers[0].mlp.up_proj = copy.deepcopy(layers[0].mlp.up_proj)
    layers[0].mlp.up_proj.weight.data.zero_()
    assert differ(passes(backbone, tokens), before) > WRONG
    assert backbone.compiled.eager.total() > noted


def test_reasons_are_said_once(backbone, tokens, caplog):
    model = backbone.model
    with torch.no_grad():
        for _ in range(2):
            model(tokens, past_key_values=DynamicCache(config=model.config))
        model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=tokens.shape[1]))
        model(tokens, use_cache=False, cu_seq_lens_q=torch.tensor([0, 19]))
    said = [record.message for record in caplog.records if record.message.startswith("not compiled")]
    for line, about in zip(said, ("not static", "as long as its static cache", "told cu_seq_lens_q"), strict=True):
        assert about in line


def gradients(backbone, sub_network, tokens, precision):
    with backbone.use(sub_network), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        backbone.model(tokens, labels=tokens, use_cache=False).loss.backward()
    found = {n: p.grad.clone() for n, p in backbone.model.named_parameters() if p.grad is not None}
    backbone.model.zero_grad()
    return found


@pytest.mark.parametrize(("precision", "checkpointing"), [("fp32", False), ("bf16", False), ("fp32", True)])
def test_training_passes_have_the_gradients_of_the_network(tokens, as_traced, precision, checkpointing, monkeypatch):
    monkeypatch.setattr(with_gradients.torch, "compile", lambda function, **_: function)
    backbone = with_compensation(elastic_pair(make_llama())[1])
    if checkpointing:
        backbone.enable_activation_checkpointing()
    backbone.model.train()
    half, full = backbone.space.uniform(0.5, 0.5), backbone.space.full()
    expected, other = (gradients(backbone, each, tokens, precision) for each in (half, full))
    compiled(backbone)
    found = gradients(backbone, half, tokens, precision)
    assert {row.phase for row in backbone.compiled.compilations} == {"training"}
    assert not backbone.compiled.eager
    assert found.keys() == expected.keys() != other.keys()
    largest = max(float(each.abs().max()) for each in expected.values())
    apart = max(float((found[name] - expected[name]).abs().max()) for name in found)
    assert apart < (1e-2 if precision == "bf16" else 1e-5) * largest
    backbone.model.eval()
    with torch.no_grad(), backbone.use(half):
        # without gradients it is other code
        backbone.model(tokens, use_cache=False)
    assert {row.phase for row in backbone.compiled.compilations} == {"training", "prefill"}


def test_copies_extracts_and_what_is_undone_run_as_they_are(backbone, tokens):
    half = backbone.space.uniform(0.5, 0.5)
    with backbone.use(half):
        expected = passes(backbone, tokens)[-1]
    small = extract(backbone, half)
    assert all(layer._compiled_call_impl is None for layer in small.model.layers)
    with torch.no_grad():
        assert differ([small(tokens).logits], [expected]) < TOLERANCE
    assert all(each._compiled_call_impl is None for each in pickle.loads(pickle.dumps(small)).model.layers)
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert other.compiled is None
        assert differ(passes(other, tokens), passes(backbone, tokens)) < TOLERANCE
    dense = backbone.undo()
    assert all(layer._compiled_call_impl is None for layer in dense.model.layers)
    assert backbone.compiled is None


@pytest.fixture
def recordings(backbone, monkeypatch):
    """Recorded steps without a GPU: what was recorded runs again, on the same tensors."""
    made = []

    def record(run, rewind):
        output = run()
        rewind()
        made.append(output)
        return lambda: output.copy_(run()), output

    monkeypatch.setattr(recorded_steps, "record", record)
    backbone.compiled._steps = RecordedSteps()
    return made


def test_a_recorded_step_is_that_of_all_layers(backbone, tokens, recordings, caplog):
    space = backbone.space
    some = [space.full(), space.uniform(0.5, 0.5), SubNetwork((2, 3, 2, 1, 1, 0))]
    expected = [expected_of(backbone, each, tokens) for each in some]
    backbone.compiled._steps = RecordedSteps()
    for _ in range(2):
        for sub_network, logits in zip(some, expected, strict=True):
            with backbone.use(sub_network):
                assert differ(passes(backbone, tokens), logits) < TOLERANCE
    # for every cache once, of its two steps
    assert len(recordings) == 6
    assert not backbone.compiled.eager
    handle = backbone.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert differ(passes(backbone, tokens), expected[0]) < TOLERANCE
    assert len(recordings) == 6
    assert "something was put on" in caplog.text
    handle.remove()
    assert differ(passes(backbone, tokens), expected[0]) < TOLERANCE
    assert len(recordings) == 7


def test_recordings_that_were_used_longest_ago_go_first(backbone, tokens, recordings, monkeypatch):
    monkeypatch.setattr(recorded_steps, "MOST", 1)
    for _ in range(2):
        passes(backbone, tokens)
    assert len(recordings) == 2
    assert len(backbone.compiled._steps._known) == 1


def test_dropout_is_on_in_training_alone(tokens, as_traced, monkeypatch):
    monkeypatch.setattr(with_gradients.torch, "compile", lambda function, **_: function)
    model = make_gpt2(resid_pdrop=0.5)
    backbone = compiled(elastic_pair(model)[1])
    with torch.no_grad():
        backbone.model.train()
        noisy = backbone.model(tokens, use_cache=False).logits
        backbone.model.eval()
        calm = backbone.model(tokens, use_cache=False).logits
        expected = model.eval()(tokens, use_cache=False).logits
    assert differ([calm], [expected]) < TOLERANCE
    assert differ([noisy], [expected]) > WRONG


def test_inference_mode_is_compiled_too(backbone, tokens):
    expected = passes(backbone, tokens)[-1]
    compiled(backbone)
    with torch.inference_mode():
        assert differ([backbone.model(tokens, use_cache=False).logits], [expected]) < TOLERANCE


def test_graphs_need_a_gpu(backbone):
    with pytest.raises(ValueError, match="graphs are CUDA graphs, but the network is on cpu"):
        backbone.compile_widths(graphs=True)


def test_a_graph_that_lacks_the_residual_is_wrong(backbone, tokens, nothing_kept, monkeypatch):
    """The control of the first test: what it compares would differ."""
    expected = passes(backbone, tokens)
    nothing_kept.clear()
    forward = branch.Branch.forward
    monkeypatch.setattr(branch.Branch, "forward", lambda self, tensors: forward(self, tensors) - tensors[0])
    assert differ(passes(compiled(backbone), tokens), expected) > WRONG


@torch.no_grad()
def decoded(backbone, tokens):
    """Logits of tokens that come one by one."""
    cache = StaticCache(config=backbone.model.config, max_cache_len=ROOM)
    return [backbone.model(tokens[:, [i]], past_key_values=cache, use_cache=True).logits for i in range(3)]


def test_code_is_that_of_the_graph_and_is_kept(tokens, tmp_path, monkeypatch):
    """By AOTInductor: two graphs, seconds each."""
    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path))
    _, backbone = elastic_pair(make_llama())
    half = backbone.space.uniform(mlp=0.5)
    with backbone.use(half):
        expected, full = decoded(backbone, tokens), None
        for from_disk in (False, True):
            # whichever folder the weights come from
            backbone.model.config.name_or_path = f"of/{from_disk}"
            backbone.compile_widths()
            assert differ(decoded(backbone, tokens), expected) < TOLERANCE
            assert [row.from_disk for row in backbone.compiled.compilations] == 2 * [from_disk]
    backbone.compile_widths(False)
    full = decoded(backbone, tokens)
    assert differ(full, expected) > WRONG


def test_a_machine_that_cannot_compile_says_so(tokens, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nand so on")

    monkeypatch.setenv("FLEXTRON_CACHE", str(tmp_path))
    monkeypatch.setattr(packages.torch._inductor, "aoti_compile_and_package", fails)
    _, backbone = elastic_pair(make_llama())
    backbone.compile_widths()
    with pytest.raises(ValueError, match=r"cannot compile \(no C\+\+ compiler\): install"):
        decoded(backbone, tokens)
