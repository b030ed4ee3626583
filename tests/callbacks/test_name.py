"""`callbacks` and `flextron_lit.callbacks` are one thing, and whoever has a `callbacks` of their own keeps it."""

import pkgutil

import pytest

from tests.callbacks.fresh import run
from tests.front_door import ROOT

FIRST = {
    "ours": "import flextron_lit.callbacks",
    "short": "import callbacks",
    "submodule": "import callbacks.budget_sampling",
    "class": "from callbacks import BudgetSampling",
    "submodule of ours": "import flextron_lit.callbacks.progress, callbacks.budget_sampling",
}
"""What may be imported before anything else."""
SAME = """
from importlib import import_module
from pkgutil import iter_modules
import callbacks, flextron_lit.callbacks
twice = [
    module.name
    for module in iter_modules(flextron_lit.callbacks.__path__)
    if import_module("callbacks." + module.name) is not import_module("flextron_lit.callbacks." + module.name)
]
one = callbacks is flextron_lit.callbacks and callbacks.__spec__.name == "flextron_lit.callbacks"
print(one, callbacks.budget_sampling.BudgetSampling is flextron_lit.callbacks.BudgetSampling, twice)
"""
ONE = "True True []"
MODULES = [module.name for module in pkgutil.iter_modules([str(ROOT / "callbacks")])]
WITHOUT_ADOPTING = "import flextron_lit.callbacks_name as name; name.adopt = lambda: None\n"
WITHOUT_FINDER = "import sys, flextron_lit; sys.meta_path[:] = [f for f in sys.meta_path if 'Callb' not in repr(f)]\n"
WITHOUT_INSTALLING = "import flextron_lit.callbacks_name as name; name.install = lambda **_: None\n"
COMMAND = "from flextron_lit.commands.fit import StageCLI\n"
NAMES = "import callbacks; print(callbacks.Mine.__module__, callbacks.BudgetSampling.__module__)"
SHARED = "import callbacks; print(callbacks.Mine.__module__, callbacks.ExactResume.__module__)"
THEIRS = "class Mine: pass\nclass ExactResume: pass\n"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What every snippet below prints."""
    folder = tmp_path_factory.mktemp("name")
    places = {name: folder / name for name in ("output", "site", "raising", "own", "folder", "empty")}
    for place in places.values():
        place.mkdir()
    # as pip installs it: nothing of ours is called `callbacks` until the package is imported
    (places["site"] / "flextron_lit").symlink_to(ROOT / "flextron_lit")
    site = [places["site"]]
    (places["raising"] / "callbacks.py").write_text("raise RuntimeError('not yours')\n")
    (places["own"] / "callbacks.py").write_text(THEIRS)
    (places["folder"] / "callbacks").mkdir()
    snippets = {f"checkout, {name}": (ROOT, [], f"{first}\n{SAME}") for name, first in FIRST.items()}
    snippets |= {
        f"installed, {name}": (places["empty"], site, f"import flextron_lit\n{first}\n{SAME}")
        for name, first in FIRST.items()
    }
    snippets |= {
        "checkout without": (ROOT, [], f"{WITHOUT_ADOPTING}{SAME}"),
        "installed without": (places["empty"], site, f"{WITHOUT_FINDER}{SAME}"),
        "raising": (places["raising"], site, f"{COMMAND}print(StageCLI.__name__)"),
        "raising, in a checkout": (places["raising"], [ROOT], f"{COMMAND}print(StageCLI.__name__)"),
        "raising without": (places["raising"], site, "import callbacks"),
        "own": (places["own"], site, f"{COMMAND}{NAMES}"),
        "own, in a checkout": (places["own"], [ROOT], f"{COMMAND}{NAMES}"),
        "own, imported before": (places["own"], site, f"import callbacks\n{COMMAND}{NAMES}"),
        "own without": (places["own"], site, f"{WITHOUT_INSTALLING}{COMMAND}{NAMES}"),
        "own, a name of both": (places["own"], site, f"{COMMAND}{SHARED}"),
        "own, a name of nobody": (places["own"], site, f"{COMMAND}import callbacks; callbacks.Nobody"),
        "own, the library alone": (places["own"], site, f"import flextron_lit\n{NAMES}"),
        "folder": (places["folder"], site, f"{COMMAND}{SAME}"),
        "folder, in a checkout": (places["folder"], [ROOT], f"{COMMAND}{SAME}"),
        "folder without": (places["folder"], site, f"{WITHOUT_INSTALLING}{COMMAND}{SAME}"),
    }
    return run(snippets, places["output"])


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("place", ["checkout", "installed"])
def test_everything_is_one_object_under_both_names(printed, place, first):
    assert printed[f"{place}, {first}"] == ONE


def test_without_the_mechanism_there_would_be_two_or_none(printed):
    assert printed["checkout without"].startswith("False False")
    assert all(repr(module) in printed["checkout without"] for module in MODULES)
    assert printed["installed without"] == "ModuleNotFoundError: No module named 'callbacks'"


@pytest.mark.parametrize("place", ["raising", "raising, in a checkout"])
def test_a_module_of_the_users_that_raises_is_not_imported_unasked(printed, place):
    assert printed[place] == "StageCLI"
    # the control: whoever imports it gets the user's
    assert printed["raising without"] == "RuntimeError: not yours"


@pytest.mark.parametrize("place", ["own", "own, in a checkout", "own, imported before"])
def test_a_config_may_name_classes_of_both(printed, place):
    assert printed[place] == "callbacks flextron_lit.callbacks.budget_sampling"
    assert printed["own without"] == "AttributeError: module 'callbacks' has no attribute 'BudgetSampling'"


def test_the_users_own_wins(printed):
    assert printed["own, a name of both"] == "callbacks callbacks"
    assert "no attribute 'Nobody', nor has flextron_lit.callbacks" in printed["own, a name of nobody"]


def test_a_library_leaves_the_users_module_alone(printed):
    assert printed["own, the library alone"] == "AttributeError: module 'callbacks' has no attribute 'BudgetSampling'"


@pytest.mark.parametrize("place", ["folder", "folder, in a checkout"])
def test_a_folder_of_that_name_that_is_no_package_harms_nothing(printed, place):
    assert printed[place] == ONE
    assert printed["folder without"] == "ModuleNotFoundError: No module named 'callbacks.budget_sampling'"
