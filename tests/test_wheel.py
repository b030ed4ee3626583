"""What is installed: one top-level package, beside which a user's own `callbacks.py` lives."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from tests import house
from tests.front_door import ENVIRONMENT, ROOT

OWN = """
from lightning.pytorch import Callback


class Mine(Callback):
    def on_fit_start(self, trainer, pl_module):
        kinds = [type(each) for each in trainer.callbacks]
        print("OURS AND MINE:", *sorted(f"{k.__module__}.{k.__name__}" for k in kinds if "allbacks" in k.__module__))
"""
COMMAND = "import sys\n\nfrom flextron_lit.commands import main\n\nsys.exit(main())\n"
"""What an installed command is: a file in a folder of its own, so that the current one is not on the path."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "flextron_lit", folder / "source/flextron_lit", symlinks=True)
    shutil.copytree(ROOT / "callbacks", folder / "source/callbacks")
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, folder / "source")
    build = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", folder, "./source"]
    done = subprocess.run([sys.executable, *build], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_holds_every_module_under_one_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"flextron_lit"}
    installed = {house.module_of(name) for name in names if name.endswith(".py")}
    assert installed == {house.module_of(path) for path in house.product()} - {"main"}
    assert {"flextron_lit/report/report.css", "flextron_lit/report/report.js"} <= set(names)


def test_a_users_own_callbacks_stand_beside_ours(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    here = tmp_path / "here"
    shutil.copytree(ROOT / "configs", here / "configs")
    (here / "callbacks.py").write_text(OWN)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/flextron-lit").write_text(COMMAND)
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": ""}

    def python(*arguments):
        line = [sys.executable, *arguments]
        return subprocess.run(line, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=300)

    imported = python("-c", "from flextron_lit.commands.fit import StageCLI; print(StageCLI.__module__)")
    assert imported.stdout == "flextron_lit.commands.fit\n", imported.stderr
    short = ("--trainer.max_steps", "2", "--trainer.val_check_interval", "2")
    done = python(
        tmp_path / "bin/flextron-lit", "fit", "-c", "configs/debug.yaml", *short, "--trainer.callbacks+=callbacks.Mine"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("OURS AND MINE:")]
    assert "callbacks.Mine flextron_lit.callbacks.budget_sampling.BudgetSampling" in told
    written = (here / "runs/debug/config.yaml").read_text()
    assert "class_path: flextron_lit.callbacks.BudgetSampling" in written
    assert "class_path: callbacks.Mine" in written
