import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from flextron_lit import checkpoint
from flextron_lit.checkpoint.description import describe
from flextron_lit.checkpoint.location import locate
from flextron_lit.checkpoint.weights import part_of
from flextron_lit.commands.info import tables
from flextron_lit.routers.trained import META, STALE, SURROGATE
from flextron_lit.space import LayerWidths, SpaceConfig
from flextron_lit.terminal.console import huge, ranges, settings, short, show
from tests.checkpoint.conftest import RECORD, write_checkpoint
from tests.conftest import make_llama, space_for
from tests.front_door import ROOT, fail, run, succeed


def surrogate(settings):
    """The file of a surrogate, as far as `info` reads it."""
    return save({"x": torch.zeros(1)}, {META: json.dumps({"settings": settings})})


def described(folder, **options):
    return describe(locate(folder), **options)


def printed(folder, capsys):
    show(*tables(described(folder)))
    return capsys.readouterr().out


def test_the_model_is_described_without_being_built(tmp_path, model):
    folder = tmp_path / "one"
    write_checkpoint(folder, copy.deepcopy(model), space=space_for(model))
    told, config = described(folder)["model"], model.config
    assert told["class"] == type(model).__name__
    assert told["dtype"] == ["float32"]
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "tie_word_embeddings"):
        assert told[key] == getattr(config, key), key
    assert told["num_key_value_heads"] == getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert told["intermediate_size"] == 64
    assert told["num_parameters"] == sum(p.numel() for p in model.parameters())
    assert told["num_parameters_by_part"]["mlp"] == sum(
        p.numel() for name, p in model.named_parameters() if ".mlp." in name
    )
    assert "other" not in told["num_parameters_by_part"]


def test_tied_weights_count_once_even_if_a_file_holds_both(written):
    before = described(written)["model"]["num_parameters"]
    tensors = load_file(written / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, written / "model.safetensors")
    assert described(written, verify=False)["model"]["num_parameters"] == before
    config = json.loads((written / "config.json").read_text())
    (written / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    untied = described(written, verify=False)["model"]["num_parameters"]
    assert untied == before + tensors["lm_head.weight"].numel()


@pytest.mark.parametrize("tied", [True, False])
def test_a_config_that_does_not_say_so_is_tied_if_the_file_has_no_output_layer(tmp_path, tied):
    folder = tmp_path / "one"
    write_checkpoint(folder, make_llama(tie_word_embeddings=tied))
    config = json.loads((folder / "config.json").read_text())
    del config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config))
    assert described(folder, verify=False)["model"]["tie_word_embeddings"] is tied


def test_layers_that_differ_are_named(tmp_path, capsys):
    space = SpaceConfig(mlp=[16, 64], attention=[1, 4], layers={1: LayerWidths(mlp=[32, 64])})
    write_checkpoint(tmp_path / "one", space=space)
    shown = printed(tmp_path / "one", capsys)
    assert "3 x attention: KV groups [1, 4]" in shown
    assert "2 x mlp: neurons [16, 64] (layers 0, 2)" in shown
    assert "1 x mlp: neurons [32, 64] (layers 1)" in shown
    assert described(tmp_path / "one")["space"]["num_sub_networks"] == 2**6


def test_history_is_shown_stage_by_stage(tmp_path, capsys):
    write_checkpoint(tmp_path / "one", history=[RECORD, RECORD | {"stage": "Router", "calibration": None}])
    shown = printed(tmp_path / "one", capsys)
    for piece in (
        "stage 1 of 2: ElasticTraining",
        "stage 2 of 2: Router",
        "12,345",
        "6,789,000",
        "stories: [red]/a.txt, weight 1.5, tokens 4,321 train, 12 test",
        "block_size 512",
        "optimizer: class AdamW, lr 0.25",
        "abc123",
    ):
        assert piece in shown
    assert "ffff" not in shown
    assert described(tmp_path / "one")["history"][0] == RECORD


def test_what_later_stages_add_is_listed(written, capsys):
    assert printed(written, capsys).count("none") == 4
    for name in ("costs/latency.json", "routers/static.safetensors", "elastic/surrogate.safetensors"):
        (written / name).parent.mkdir(exist_ok=True)
        (written / name).touch()
    (written / "elastic/surrogate.safetensors").write_bytes(surrogate({}))
    told = described(written)
    assert told["costs"] == ["costs/latency.json"]
    assert told["routers"] == ["routers/static.safetensors"]
    assert told["surrogate"] == "elastic/surrogate.safetensors"
    assert told["bytes"] == sum(p.stat().st_size for p in written.rglob("*") if p.is_file())
    assert "added since: costs/latency.json" in printed(written, capsys)


def test_routers_that_know_another_network_are_told(written, capsys):
    (written / "routers").mkdir()
    for name, about in (("static-flops-1", {}), ("dynamic-flops-2", {STALE: "JointTuning"})):
        (written / f"routers/{name}.json").write_text(json.dumps({"settings": about}))
    (written / SURROGATE).write_bytes(surrogate({}))
    assert described(written)["stale"] == {"routers/dynamic-flops-2.json": "JointTuning"}
    (written / SURROGATE).write_bytes(surrogate({STALE: "JointTuning"}))
    assert described(written)["stale"] == dict.fromkeys((SURROGATE, "routers/dynamic-flops-2.json"), "JointTuning")
    assert "dynamic-flops-2.json, since JointTuning changed the network" in printed(written, capsys)
    (written / "routers/static-flops-1.json").write_text("{")
    with pytest.raises(ValueError, match="static-flops-1.json is damaged"):
        described(written)
    (written / SURROGATE).write_bytes(b"{")
    with pytest.raises(ValueError, match="surrogate.safetensors is damaged"):
        described(written)


def test_integrity_is_told(written, capsys):
    assert "6 files are as they were written" in printed(written, capsys)
    assert described(written, verify=False)["verified"] is None
    record = json.loads((written / "flextron.json").read_text())
    del record["sha256"]
    (written / "flextron.json").write_text(json.dumps(record))
    assert "cannot be verified" in printed(written, capsys)


def test_digests_are_compared_unless_told_otherwise(written):
    weights = written / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        described(written)
    assert described(written, verify=False)["history"] == [RECORD]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norms"),
        ("model.layers.0.post_attention_layernorm.weight", "norms"),
        ("model.layers.0.mlp.up_proj.weight", "mlp"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.ln_1.weight", "norms"),
        ("transformer.wpe.weight", "embedding"),
        ("something.else", "other"),
    ],
)
def test_every_tensor_belongs_to_a_part(name, part):
    assert part_of(name) == part


def test_numbers_can_be_read():
    assert [short(n) for n in (999, 1500, 134_515_008, 70_000_000_000)] == ["999", "1.5k", "134.5M", "70.0B"]
    assert [huge(n) for n in (3072, 7 * 10**400)] == ["3,072", "about 7.0e400"]
    assert ranges([0, 1, 2, 4, 7, 8]) == "0-2, 4, 7-8"
    assert list(settings({"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": 4})) == ["a 1, f 4", "b: c 2", "b.d: e 3"]


def test_info_through_the_front_door(written):
    shown = succeed("info", written)
    assert "LlamaForCausalLM, float32" in shown
    assert "run folder" not in shown
    assert json.loads(succeed("info", written, "--json"))["history"] == [RECORD]


def test_info_on_a_run_folder_says_so(tmp_path):
    write_checkpoint(tmp_path / "run" / "flextron")
    shown = succeed("info", tmp_path / "run")
    assert f"{tmp_path / 'run'} is a run folder (new); its checkpoint is {tmp_path / 'run' / 'flextron'}" in shown


@pytest.mark.parametrize("name", ["model.safetensors", "flextron.json", "elastic/order.safetensors", "config.json"])
def test_a_damaged_checkpoint_is_one_clear_error(written, name):
    content = (written / name).read_bytes()
    (written / name).write_bytes(content[: len(content) // 2])
    for verify in (True, False):
        with pytest.raises(ValueError, match=f"^{written}.* is damaged"):
            described(written, verify=verify)


def test_damage_is_one_line_at_the_front_door(written):
    weights = written / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    message = fail("info", written)
    assert message.startswith(f"error: {weights} is damaged: its sha256 is")
    assert message.count("\n") == 1
    assert "float32" in succeed("info", written, "--no_verify")


def test_a_folder_that_is_none_is_one_clear_error(tmp_path):
    ended = run("info", tmp_path / "none")
    assert ended.returncode == 2
    assert ended.stderr == f"error: there is no folder {tmp_path / 'none'}\n"


def test_help_teaches_with_an_example():
    assert "Example: main.py info runs/quickstart/elastic" in " ".join(succeed("info", "--help").split())


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("flextron_lit.commands", "torch"), ("flextron_lit.commands.info", "transformers")],
)
def test_what_answers_at_once_imports_nothing_heavy(module, heavy):
    probe = f"import sys, {module}; print({heavy!r} in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "False\n"


def test_a_checkpoint_that_reading_accepts_is_described(written):
    assert len(checkpoint.read(written).space) == 2 * described(written)["model"]["num_hidden_layers"]
