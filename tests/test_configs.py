import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flextron_lit import stages
from flextron_lit.commands.fit import StageCLI
from tests.front_door import ROOT

ELASTIC = ("stages/elastic.yaml", "models/smollm2-135m.yaml", "data/embedded.yaml")
MODELS = ("gpt2", "llama-2-7b", "mistral-7b", "pythia-160m", "qwen3-0.6b", "tinyllama-1.1b")
COMBINATIONS = [
    ("debug.yaml",),
    ("debug.yaml", "trainer/ddp.yaml"),
    ("debug.yaml", "trainer/fsdp.yaml"),
    ("debug.yaml", "trainer/slurm.yaml"),
    ("debug.yaml", "trainer/latency.yaml"),
    (*ELASTIC, "trainer/cpu.yaml"),
    *(("stages/elastic.yaml", f"models/{name}.yaml", "data/embedded.yaml", "trainer/gpu.yaml") for name in MODELS),
    (*ELASTIC, "trainer/gpu.yaml"),
    (*ELASTIC[:2], "data/streaming.yaml", "trainer/gpu.yaml"),
    (*ELASTIC, "trainer/ddp.yaml", "optimizer/adamw8bit.yaml"),
]
ROUTER = [
    ("stages/surrogate.yaml", "data/embedded.yaml", "trainer/cpu.yaml"),
    ("stages/static_router.yaml", "data/generated.yaml", "trainer/cpu.yaml"),
    ("stages/dynamic_router.yaml", "data/generated.yaml", "trainer/cpu.yaml"),
    ("stages/joint_tuning.yaml", "data/embedded.yaml", "trainer/gpu.yaml"),
]
ROUTED = ("quickstart.yaml", "debug_pipeline.yaml", "gpu_pipeline.yaml")
PIPELINES = (*ROUTED, "depth.yaml")


def printed_by(monkeypatch, capsys, *arguments):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        StageCLI()
    printed = capsys.readouterr()
    assert end.value.code in (0, None), printed.err
    return printed.out


def resolved(monkeypatch, capsys, *arguments):
    return yaml.safe_load(printed_by(monkeypatch, capsys, *arguments, "--print_config"))


@pytest.mark.parametrize("files", COMBINATIONS, ids=lambda files: "+".join(Path(f).stem for f in files))
def test_a_combination_of_configs_resolves(files, monkeypatch, capsys):
    config = resolved(monkeypatch, capsys, *(a for f in files for a in ("-c", f"configs/{f}")))
    assert config["model"]["class_path"] == "flextron_lit.stages.ElasticTraining"
    assert config["data"]["init_args"]["domains"]
    assert any(c["class_path"] == "callbacks.BudgetSampling" for c in config["trainer"]["callbacks"])
    if "trainer/latency.yaml" in files:
        assert config["trainer"]["callbacks"][-1]["class_path"] == "callbacks.LatencyProfiling"
    if "optimizer/adamw8bit.yaml" in files:
        assert config["model"]["init_args"]["optimizer"]["class_path"] == "bitsandbytes.optim.AdamW8bit"


@pytest.mark.parametrize("files", ROUTER, ids=lambda files: Path(files[0]).stem)
def test_a_later_stage_resolves_on_the_checkpoint_of_the_one_before(files, monkeypatch, capsys):
    options = [a for f in files for a in ("-c", f"configs/{f}")]
    config = resolved(monkeypatch, capsys, *options, "--model.init_args.checkpoint", "runs/before/flextron")
    assert config["model"]["init_args"]["checkpoint"] == "runs/before/flextron"
    assert config["model"]["class_path"].endswith(("Training", "Tuning"))


@pytest.mark.parametrize("name", ["Elastic", "Surrogate", "StaticRouter", "DynamicRouter", "Joint"])
def test_every_setting_of_a_stage_is_an_option_with_its_type_default_and_help(name, monkeypatch, capsys):
    """jsonargparse finds them in the dataclass that the constructor hands its keywords to."""
    stage = getattr(stages, name + ("Tuning" if name == "Joint" else "Training"))
    monkeypatch.setenv("COLUMNS", "200")
    shown = printed_by(monkeypatch, capsys, "--model.help", f"flextron_lit.stages.{stage.__name__}")
    for field in dataclasses.fields(inspect.get_annotations(stage)["options"]):
        if not dataclasses.is_dataclass(field.default):
            (found,) = re.findall(rf"^  --model\.{field.name}[ ,].*?(?=^  --|^$)", shown, re.MULTILINE | re.DOTALL)
            assert re.search(r"[a-z]{2}.*\(type: .*, default: ", " ".join(found.split())), found
        else:
            assert f"--model.{field.name}." in shown


def test_a_typo_in_a_config_does_not_resolve(monkeypatch, capsys, tmp_path):
    (tmp_path / "typo.yaml").write_text("model:\n  init_args:\n    chekpoint: x\n")
    with pytest.raises(AssertionError, match="chekpoint"):
        resolved(monkeypatch, capsys, "-c", "configs/debug.yaml", "-c", tmp_path / "typo.yaml")


@pytest.mark.parametrize("name", PIPELINES)
def test_every_stage_of_a_pipeline_resolves(name, monkeypatch, capsys):
    pipeline = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert pipeline["stages"]
    for number, stage in enumerate(pipeline["stages"].values()):
        files = [a for f in stage["configs"] for a in ("-c", f"configs/{f}")]
        before = ["--model.init_args.checkpoint", "runs/before/flextron"] if number else []
        for settings in ("settings", "quick"):
            chosen = stage.get(settings, {})
            files += ["-c", yaml.safe_dump(chosen, default_flow_style=True)] if chosen else []
            config = resolved(monkeypatch, capsys, *files, *before)
            for name, value in chosen.get("trainer", {}).items():
                assert config["trainer"][name] == value or name == "callbacks"


def test_every_config_is_covered_and_opens_with_its_command():
    configs = ROOT / "configs"
    used = {f for files in COMBINATIONS + ROUTER for f in files} | set(PIPELINES)
    found = {str(p.relative_to(configs)) for p in configs.rglob("*.yaml")}
    assert found <= used
    for name in found:
        head = [line for line in (configs / name).read_text().splitlines() if line.startswith("#")]
        assert any("python main.py" in line or "-c configs" in line for line in head), name


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", ROUTED)
def test_routers_that_are_tuned_together_are_for_one_cost(name, quick):
    stages = yaml.safe_load((ROOT / "configs" / name).read_text())["stages"]
    costs = []
    for router in ("static_router", "dynamic_router"):
        stage = stages[router]
        layers = [stage.get("settings", {}), *([stage.get("quick", {})] if quick else [])]
        given = [_init_args(layer)["cost"] for layer in layers if "cost" in _init_args(layer)]
        costs.append(given[-1] if given else "latency")
    # the quickstart tunes the static one alone, since its budgets are of this machine's latency
    tuned = _init_args(stages["joint_tuning"].get("settings", {})).get("router", "static")
    assert tuned == ("static" if name == "quickstart.yaml" else "both")
    assert tuned == "static" or len(set(costs)) == 1, costs


def _init_args(settings):
    return settings.get("model", {}).get("init_args", {})


def test_the_readme_names_every_top_level_entry():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    tops = {path.split("/")[0] + ("/" if "/" in path else "") for path in tracked}
    readme = (ROOT / "README.md").read_text()
    assert not [top for top in tops if not top.startswith(".") and top not in readme]
