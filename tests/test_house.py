"""The house stays one that a stranger finds his way in: few rooms, arrows one way, short files."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house
from tests.front_door import ROOT

LIMITS = {"rooms": 25, "arrows": 148, "entries": 22, "file": 350, "function": 60, "code": 19_620}
LINTER = Path(sys.executable).with_name("lint-imports")


@pytest.fixture(scope="module")
def files():
    return house.product()


def lint(folder):
    return subprocess.run([LINTER, "--no-cache"], cwd=folder, capture_output=True, text=True, check=False)


def test_a_stranger_can_take_it_in(files):
    assert len({house.room_of(house.module_of(path)) for path in files}) <= LIMITS["rooms"]
    assert len(house.entries(files)) <= LIMITS["entries"]
    assert house.alike(files) == []
    # the control: this is what it is to find
    assert house.alike(["a/report.py", "a/reporting.py", "b/losses.py"]) == [("report", "reporting")]


def test_no_two_rooms_import_each_other(files):
    drawn = house.arrows(files)
    assert len(drawn) <= LIMITS["arrows"]
    assert [pair for pair in drawn if pair[::-1] in drawn] == []


def test_files_and_functions_are_read_at_a_glance(files):
    assert max(text.count("\n") for text in files.values()) <= LIMITS["file"]
    assert house.longest_functions(files)[0][0] <= LIMITS["function"]
    assert sum(map(house.code_lines, files.values())) <= LIMITS["code"]


def test_blanks_comments_and_docstrings_are_no_code():
    assert (
        house.code_lines('"""What."""\n\n# why\nA = """two\nlines"""\n\n\ndef f():\n    """What."""\n    return 1\n')
        == 4
    )


@pytest.mark.parametrize("page", ["architecture.md", "adding-a-family.md"])
def test_the_docs_name_files_that_are_there(page):
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", (ROOT / "docs" / page).read_text()))
    assert len(named) > 3
    assert [name for name in named if not ((ROOT / name).exists() or (ROOT / "flextron_lit" / name).exists())] == []


@pytest.mark.parametrize("upward", [None, "latency/timing.py"])
def test_arrows_point_one_way(tmp_path, upward):
    for name in ("flextron_lit", "callbacks", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    if upward is None:
        assert lint(tmp_path).returncode == 0, lint(tmp_path).stdout
        return
    with (tmp_path / "flextron_lit" / upward).open("a") as file:
        file.write("\n\ndef late():\n    from flextron_lit.stages import Stage\n\n    return Stage\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "flextron_lit.latency is not allowed to import flextron_lit.stages" in done.stdout
