"""Commands that train nothing start without Lightning, which takes as long to import as all else."""

import subprocess
import sys

from tests.front_door import ROOT

PROBE = """
import importlib, sys

for name in sys.argv[1:]:
    importlib.import_module(f"flextron_lit.commands.{name}")
print("lightning" in sys.modules, "transformers" in sys.modules)
"""


def loaded(*commands):
    line = [sys.executable, "-c", PROBE, *commands]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_what_reads_files_alone_needs_neither_lightning_nor_transformers():
    assert loaded("info", "diff") == ["False", "False"]


def test_what_runs_a_network_needs_no_lightning():
    assert loaded("generate", "serve", "select", "export", "profile", "reroute") == ["False", "True"]
    # the control
    assert loaded("fit")[0] == "True"
