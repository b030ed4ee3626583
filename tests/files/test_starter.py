import os
import signal
import subprocess
import sys
import time

import pytest

from flextron_lit.files.starter import STARTER
from tests.front_door import ROOT

RANK = """
import sys, time
from flextron_lit.files.starter import end_with_starter
end_with_starter()
print("ready", flush=True)
time.sleep(60)
"""
FIRST = """
import os, subprocess, sys, time
from flextron_lit.files.starter import end_with_starter
end_with_starter()
os.environ["LOCAL_RANK"] = sys.argv[2]
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
assert rank.stdout.readline() == b"ready\\n"
print(rank.pid, flush=True)
time.sleep(60)
"""


def running(number):
    try:
        with open(f"/proc/{number}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("local_rank", "outlives"), [("1", False), ("0", True)])
def test_a_further_rank_does_not_outlive_the_first(local_rank, outlives):
    """The control is a process that is no further rank: one that a user's script starts, say."""
    clean = {name: value for name, value in os.environ.items() if name not in (STARTER, "LOCAL_RANK")}
    line = [sys.executable, "-c", FIRST, RANK, local_rank]
    with subprocess.Popen(line, cwd=ROOT, env=clean, stdout=subprocess.PIPE) as first:
        number = int(first.stdout.readline())
        first.kill()
    deadline = time.monotonic() + (1 if outlives else 20)
    while running(number) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(number) == outlives
    if outlives:
        os.kill(number, signal.SIGKILL)


def test_a_rank_whose_starter_is_gone_already_ends():
    environment = os.environ | {STARTER: "1", "LOCAL_RANK": "1"}
    done = subprocess.run([sys.executable, "-c", RANK], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "has ended" in done.stderr
