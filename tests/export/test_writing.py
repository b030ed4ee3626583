"""What is written is verified, whole, and never in the way of what was there."""

import json
import resource

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flextron_lit.checkpoint.in_memory import Loaded
from flextron_lit.costs import Workload
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.export import gguf_file, verification
from flextron_lit.export.card import Origin
from flextron_lit.export.forms import Form, HuggingFaceFolder
from flextron_lit.export.gguf_tokenizer import byte_pairs
from flextron_lit.export.small_model import cut_out
from flextron_lit.export.verification import TOLERANCE
from flextron_lit.export.writing import export, round_weights
from flextron_lit.routers.from_budget import Selection
from flextron_lit.space import SubNetwork
from tests.conftest import with_compensation
from tests.export.families import MAKE, SPACE, VOCABULARY, make_tokenizer
from tests.options import seed

SKIPS = SubNetwork((1, 2, 0, 1, 3, 0))
# the sizes of matrices are whole blocks of NF4
EVEN = SubNetwork((2, 2, 3, 2, 3, 3))
# 3 of 4 groups in every layer; the attention of layer 0 has no width 0
THREE = SubNetwork((1, 3, 2, 3, 2, 3))
PLAIN = Form()


def loaded(family="llama", **more):
    return Loaded(with_compensation(ElasticBackbone(MAKE[family](**more), SPACE)), make_tokenizer(), None, None)


def written(folder, form=PLAIN, sub_network=SKIPS, family="llama", batches=(), **more):
    selection = Selection("0.5", sub_network, "by hand", None)
    origin = Origin("somewhere", selection, {}, Workload(), None, "text.txt" if batches else None)
    return export(loaded(family, **more), folder, form, origin, batches)


@pytest.fixture
def batches():
    ids = torch.randint(1, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(seed(4)))
    return [{"input_ids": ids[:2], "labels": ids[:2]}, {"input_ids": ids[2:], "labels": ids[2:]}]


def corrupt(folder):
    """One weight of one file, by a thousandth."""
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.self_attn.o_proj.weight"][3, 5] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_one_wrong_weight_is_noticed_and_nothing_is_left(tmp_path, monkeypatch):
    original = HuggingFaceFolder.write

    def write(self, folder):
        original(self, folder)
        corrupt(folder)

    assert written(tmp_path / "good").difference <= TOLERANCE
    monkeypatch.setattr(HuggingFaceFolder, "write", write)
    with pytest.raises(ValueError, match="does not compute what the elastic network does: logits differ by"):
        written(tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_gguf_rows_in_the_wrong_order_are_noticed(tmp_path, monkeypatch):
    assert written(tmp_path / "good", Form("gguf")).difference <= TOLERANCE
    monkeypatch.setattr(gguf_file, "_interleaved", lambda weight, heads: weight)
    with pytest.raises(ValueError, match="does not compute what the elastic network does"):
        written(tmp_path / "bad", Form("gguf"))
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_a_tensor_that_is_missing_or_has_another_shape_is_noticed(tmp_path):
    backbone = loaded().backbone
    small = gguf_file_of(tmp_path / "one.gguf", backbone, SKIPS)
    least = gguf_file_of(tmp_path / "least.gguf", backbone, backbone.space.smallest())
    more = gguf_file_of(tmp_path / "more.gguf", backbone, backbone.space.smallest().replace(2, 1))
    with pytest.raises(ValueError, match="has no tensor blk.1.attn_q.weight"):
        gguf_file.read_back(tmp_path / "least.gguf", more)
    full = gguf_file_of(tmp_path / "full.gguf", backbone, backbone.space.full())
    with pytest.raises(ValueError, match=r"blk.0.attn_q.weight .* has shape \(128, 64\), not \(96, 64\)"):
        gguf_file.read_back(tmp_path / "full.gguf", small)
    assert least.parameters < more.parameters < small.parameters < full.parameters


def gguf_file_of(path, backbone, sub_network):
    small = cut_out(backbone, sub_network)
    gguf_file.write(path, small, byte_pairs(make_tokenizer(), VOCABULARY), name="tiny", stored="float32")
    return small


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_narrower_types_are_rounded_and_otherwise_exact(tmp_path, form, batches):
    exact = written(tmp_path / "32", Form(form), batches=batches)
    rounded = written(tmp_path / "16", Form(form, "bfloat16"), batches=batches)
    assert exact.difference <= TOLERANCE
    assert abs(exact.loss - exact.elastic_loss) < 1e-5
    assert 1e-3 < rounded.difference < 0.1
    assert rounded.elastic_loss == exact.elastic_loss
    assert 0 < abs(rounded.loss - rounded.elastic_loss) < 0.1
    size = {name: sum(p.stat().st_size for p in (tmp_path / name).glob("model*")) for name in ("16", "32")}
    assert size["16"] < 0.7 * size["32"]
    if form == "hf":
        weights = load_file(tmp_path / "16" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize(("form", "sub_network"), [("hf", EVEN), ("remote-code", EVEN), ("gguf", SKIPS)])
def test_quantising_says_what_it_costs(tmp_path, form, sub_network, batches):
    plain = written(tmp_path / "plain", Form(form), sub_network, batches=batches)
    found = {}
    for quantize in ("q8_0",) if form == "gguf" else ("int8", "nf4"):
        found[quantize] = written(tmp_path / quantize, Form(form, quantize=quantize), sub_network, batches=batches)
        # random weights lose more than trained ones; NF4 most of all
        assert TOLERANCE < found[quantize].difference < 1
        assert found[quantize].elastic_loss == plain.elastic_loss
        assert found[quantize].loss != plain.loss
        said = (tmp_path / quantize / "README.md").read_text()
        assert f"{found[quantize].loss:.4f} nats per token on text.txt" in said
        assert f"differ by up to {found[quantize].difference:.1%}" in said
    if form != "gguf":
        assert found["int8"].difference < found["nf4"].difference
        config = json.loads((tmp_path / "nf4" / "config.json").read_text())
        assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
        weights = load_file(tmp_path / "int8" / "model.safetensors")
        assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_quantised_gpt2_with_its_transposed_matrices(tmp_path):
    """By the numbers in the file: how int8 products come out differs between processors (oneDNN saturates on some)."""
    written(tmp_path / "plain", PLAIN, family="gpt2")
    written(tmp_path / "int8", Form(quantize="int8"), family="gpt2")
    plain, quantised = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "int8"))
    integers = [name for name, weight in quantised.items() if weight.dtype == torch.int8]
    assert len(integers) > 4
    for name in integers:
        scales = quantised[name.replace("weight", "SCB")][:, None] / 127
        # half a step, and what float16 rounds before that
        assert ((quantised[name] * scales - plain[name].t()).abs() <= 0.6 * scales).all(), name
        # the control: a square matrix the other way round
        if len(scales) == quantised[name].shape[1]:
            assert not ((quantised[name] * scales - plain[name]).abs() <= 0.6 * scales).all()


def test_sizes_that_nf4_cannot_pack_are_refused(tmp_path):
    reason = r"needs matrices of a multiple of 32 x 64, but model.layers.0.self_attn.k_proj is 48 x 64; take int8"
    with pytest.raises(ValueError, match=reason):
        written(tmp_path / "nf4", Form(quantize="nf4"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("gguf", "float32", "int8"), "--quantize int8 is of bitsandbytes, which llama.cpp does not read"),
        (("gguf", "float32", "nf4"), "a GGUF file takes q8_0"),
        (("hf", "float32", "q8_0"), "--quantize q8_0 is of GGUF, which is --format gguf"),
        (("stock", "float32", "q8_0"), "take int8 or nf4"),
    ],
)
def test_a_quantisation_of_another_format_is_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Form(*settings)


@pytest.mark.parametrize(
    ("family", "more", "sub_network", "reason"),
    [
        ("llama", {}, SKIPS, "it skips blocks"),
        ("llama", {}, SubNetwork((2, 1, 1, 3, 2, 2)), "its layers differ in width"),
        (
            "llama",
            {"attention_bias": True},
            THREE,
            "demands that the number of heads, 6, divides the hidden size, 64, and Mistral, which does not, has no",
        ),
        (
            "gpt2",
            {},
            THREE,
            "gpt2 takes the size of a head from their number, so it cannot have 3 heads",
        ),
        ("gpt_neox", {}, THREE, "gpt_neox takes the size of a head from their number"),
    ],
)
def test_what_no_stock_class_holds_is_refused_as_stock(tmp_path, family, more, sub_network, reason):
    with pytest.raises(ValueError, match=rf"no stock class holds this sub-network: .*{reason}"):
        written(tmp_path / "out", Form("stock"), sub_network, family, **more)
    assert not list(tmp_path.iterdir())
    # in a class of ours it is exact
    assert written(tmp_path / "out", Form("remote-code"), sub_network, family, **more).difference <= TOLERANCE


def test_a_disk_that_fills_up_leaves_the_old_export(tmp_path):
    folder = tmp_path / "out"
    written(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for form, reason in ((PLAIN, "File too large"), (Form("gguf"), "No space left on device")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        try:
            with pytest.raises(ValueError, match=rf"cannot write .*{folder} \({reason}\)"):
                written(folder, form)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rounding_changes_nothing_that_a_type_can_hold():
    backbone = loaded().backbone
    before = {name: parameter.clone() for name, parameter in backbone.model.named_parameters()}
    round_weights(backbone, torch.float32)
    assert all(torch.equal(parameter, before[name]) for name, parameter in backbone.model.named_parameters())
    round_weights(backbone, torch.bfloat16)
    for name, parameter in backbone.model.named_parameters():
        assert torch.equal(parameter, before[name].bfloat16().float())
        assert not torch.equal(parameter, before[name])


def test_a_logit_that_is_no_number_is_noticed():
    expected = torch.ones(1, 2, 3)
    verification.demand_equal(expected.clone(), expected)
    for wrong in (float("nan"), float("inf"), 1 + 2e-5):
        found = expected.clone()
        found[0, 1, 2] = wrong
        with pytest.raises(ValueError, match="nothing was kept"):
            verification.demand_equal(found, expected)


def test_the_full_network_is_the_dense_model(tmp_path):
    dense = MAKE["llama"]()
    written(tmp_path / "out", sub_network=ElasticBackbone(MAKE["llama"](), SPACE).space.full())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(exported) is type(dense)
    theirs = dict(dense.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in exported.named_parameters())
