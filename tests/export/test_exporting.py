"""The command: budgets and files, what it refuses, what it says."""

import json

import pytest
from transformers import AutoModelForCausalLM

from flextron_lit.commands.export import command
from flextron_lit.costs import COUNTED, Workload
from flextron_lit.costs.budget import parse_budget
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.export.writing import read_selection
from flextron_lit.space import SpaceConfig, SubNetwork
from tests.conftest import with_compensation
from tests.export.families import MAKE, SPACE, TEXT, write_checkpoint
from tests.front_door import fail, succeed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and a text."""
    folder = tmp_path_factory.mktemp("exporting")
    write_checkpoint(folder / "flextron", MAKE["llama"]())
    (folder / "text.txt").write_text(TEXT * 4)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def run(*options):
    command(["--checkpoint", "flextron", "--device", "cpu", *map(str, options)])


def test_a_budget_through_the_front_door(folder):
    text = ("--text", folder / "text.txt", "--tokens", 128)
    checkpoint = ("--checkpoint", folder / "flextron", "--device", "cpu")
    said = succeed("export", *checkpoint, "--budget", "parameters<=0.8", "--output", folder / "small", *text)
    assert f"wrote {folder / 'small'} (float32), read back: logits differ" in said
    assert "nats per token" in said
    record = json.loads((folder / "small" / "sub_network.json").read_text())
    backbone = with_compensation(ElasticBackbone(MAKE["llama"](), SPACE))
    limit = parse_budget("parameters<=0.8", {"parameters": COUNTED["parameters"](backbone, Workload())})[0]
    assert limit.allows(SubNetwork.from_json(record["sub_network"]))
    model = AutoModelForCausalLM.from_pretrained(folder / "small")
    assert sum(parameter.numel() for parameter in model.parameters()) == record["costs"]["parameters"]["cost"]
    card = (folder / "small" / "README.md").read_text()
    for part in (
        "base_model: somebody/something",
        "| budget | parameters<=0.8 |",
        "uniform search",
        "| 2 | ",
        "kv_bytes",
    ):
        assert part in card
    assert "text.txt, measured on the files of this folder" in card


def test_what_an_export_wrote_down_makes_the_same_export(here):
    run("--budget", "parameters<=0.8", "--text", "text.txt", "--tokens", 256, "--output", "one")
    run("--sub_network", "one/sub_network.json", "--output", "two", "--format", "gguf")
    one, two = (json.loads((here / name / "sub_network.json").read_text()) for name in ("one", "two"))
    assert one["sub_network"] == two["sub_network"]
    assert one["costs"] == two["costs"]
    assert two["how"] == f"sub_network.json ({one['how']})"
    assert "library_name: gguf" in (here / "two" / "README.md").read_text()


def test_a_mistake_is_one_clear_line(folder):
    printed = fail("export", "--checkpoint", folder / "flextron", "--budget", "1", "--output", folder)
    assert printed.strip().splitlines()[-1] == (
        f"error: {folder} exists; name another place, or replace it with --overwrite"
    )
    assert "Traceback" not in printed


def test_a_budget_of_one_is_the_full_network(here):
    run("--budget", "1", "--output", "full")
    record = json.loads((here / "full" / "sub_network.json").read_text())
    assert record["how"].startswith("no search: the full network meets")
    assert SubNetwork.from_json(record["sub_network"]) == ElasticBackbone(MAKE["llama"](), SPACE).space.full()
    assert "Not measured; `--text FILE` measures it." in (here / "full" / "README.md").read_text()


def test_only_an_export_is_replaced_and_only_when_asked(here):
    run("--budget", "1", "--output", "out")
    (here / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="out exists; name another place, or replace it with --overwrite"):
        run("--budget", "1", "--output", "out")
    assert (here / "out" / "mine.txt").is_file()
    run("--budget", "1", "--output", "out", "--overwrite", "--format", "gguf")
    assert sorted(path.name for path in (here / "out").iterdir()) == ["README.md", "model.gguf", "sub_network.json"]
    with pytest.raises(ValueError, match="flextron has no sub_network.json, so it is no export"):
        run("--budget", "1", "--output", "flextron", "--overwrite")
    assert (here / "flextron" / "flextron.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name either a --budget, or with --sub_network a file"),
        (("--budget", "1", "--sub_network", "full.json"), "name either a --budget, or with --sub_network a file"),
        (("--sub_network", "text.txt"), "text.txt is not what `select --output` writes"),
        (("--sub_network", "nowhere.json"), "nowhere.json"),
        (("--sub_network", "full.json", "--tokens", "9"), "--tokens has no effect without --text"),
        (("--budget", "1", "--tokens", "9"), "--tokens has no effect without --text"),
        (("--budget", "0.0001", "--text", "text.txt"), "the smallest flops possible is"),
        (("--budget", "quickly"), "cannot read the budget 'quickly'"),
        (("--budget", "0.5"), "the checkpoint does not say what it was trained on; name a text with --text"),
        (("--budget", "1", "--format", "gguf", "--quantize", "nf4"), "--quantize nf4 is of bitsandbytes"),
        (("--budget", "1", "--dtype", "int4"), "dtype is one of float32, bfloat16, float16, not 'int4'"),
        (("--budget", "1", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(here, options, message):
    write_selection(here / "full.json")
    with pytest.raises((ValueError, OSError), match=message):
        run(*options, "--output", "refused")
    assert not list(here.glob("refused*"))


def test_a_place_below_a_file_is_one_clear_error(here):
    with pytest.raises(ValueError, match=r"cannot write .*text.txt/out \(Not a directory\)"):
        run("--budget", "1", "--output", "text.txt/out")


def write_selection(path, **changes):
    space = ElasticBackbone(MAKE["llama"](), SPACE).space
    widths = {block.name: width for block, width in zip(space.blocks, space.widths(space.full()), strict=True)}
    record = {"budget": "1", "how": "by hand", "sub_network": space.full().to_json(), "widths": widths}
    path.write_text(json.dumps(record | changes))
    return space


def test_a_file_of_another_space_is_refused(tmp_path):
    path = tmp_path / "answer.json"
    space = write_selection(path)
    assert read_selection(path, space).sub_network == space.full()
    other = ElasticBackbone(MAKE["llama"](), SpaceConfig(mlp=[8, 16, 64, 128], attention=[1, 2, 3, 4])).space
    narrow = SubNetwork((0, 0, 0, 0, 0, 0))
    widths = {block.name: width for block, width in zip(space.blocks, (1, 0, 0, 0, 0, 0), strict=True)}
    write_selection(path, sub_network=narrow.to_json(), widths=widths)
    assert read_selection(path, space).sub_network == narrow
    with pytest.raises(
        ValueError, match="another space: there layers.0.mlp has width 0, here the same choice is width 8"
    ):
        read_selection(path, other)
    write_selection(path, sub_network=[0, 0])
    with pytest.raises(ValueError, match="2 choices, the space 6 blocks"):
        read_selection(path, space)


def test_the_help_says_that_an_export_is_static(capsys):
    with pytest.raises(SystemExit):
        command(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "It is static: a dynamic router needs the elastic network" in said
    assert "--dynamic" not in said
