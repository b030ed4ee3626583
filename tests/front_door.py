"""Commands run as a user runs them: `python main.py ...` in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def command(*arguments):
    return [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]


def run(*arguments, **environment):
    """Exit code, standard output and standard error."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def start(*arguments, **environment):
    """A running process."""
    return subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def succeed(*arguments, **environment):
    """Standard output of a command that must succeed."""
    done = run(*arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fail(*arguments, **environment):
    """Standard error of a command that must fail."""
    done = run(*arguments, **environment)
    assert done.returncode != 0, done.stdout
    return done.stderr
