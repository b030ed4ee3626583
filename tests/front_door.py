"""Commands run as a user runs them, `python main.py ...`: forked from a process that has loaded the libraries already.

A fork costs hundredths of a second where a start costs seconds. It runs the same `main.py` with the arguments, folder,
environment, exit code, output and signals of a process of its own. Where starting is what a test is about, or where
libraries are to read the environment as they load, there is `in_own_process`.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from tests.options import threads

ROOT = Path(__file__).parent.parent
MAIN = str(ROOT / "main.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": str(threads()), "HF_HUB_OFFLINE": "1"}
# of the server alone, which has to have a single thread when it forks: BLAS and Arrow would start some as they load
SINGLE = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
LONGEST = 300
"""Seconds that a command may take."""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm"])


def command(*arguments):
    return [sys.executable, MAIN, *map(str, arguments)]


def in_own_process(*arguments, **environment):
    """Exit code, standard output and standard error of a process that starts from nothing."""
    return subprocess.run(
        command(*arguments),
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LONGEST,
    )


def run(*arguments, **environment):
    """Exit code, standard output and standard error."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        for path in outputs:
            path.touch()
        process = Started(arguments, environment, *outputs)
        try:
            code = process.wait(LONGEST)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, code, *(path.read_text() for path in outputs))


def start(*arguments, **environment):
    """A running process."""
    return Started(arguments, environment, os.devnull, os.devnull)


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


class Started:
    """A forked command, with what tests use of `subprocess.Popen`."""

    def __init__(self, arguments, environment, stdout, stderr):
        # libraries have read theirs when the server loaded them
        assert all(name.startswith("FLEXTRON_") for name in environment), f"{environment}: use in_own_process"
        self.args = command(*arguments)
        self._process = FORKS.Process(
            target=_become, args=(self.args[1:], ENVIRONMENT | environment, str(stdout), str(stderr))
        )
        # the server starts with the first command
        with mock.patch.dict(os.environ, ENVIRONMENT | SINGLE):
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout=None):
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _become(arguments, environment, *outputs):
    """In the fork: be `python main.py` with these arguments."""
    for descriptor, path in enumerate(outputs, start=1):
        # of the process, not of Python alone: what libraries written in C print is output too
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=False)
    # what a command starts in turn, it starts as anywhere
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.argv = list(arguments)
    sys.path[0] = os.path.dirname(arguments[0])
    _seed_by_chance()
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        # forks leave these out, and processes of their own do not
        atexit._run_exitfuncs()


def _seed_by_chance():
    """What NumPy draws without a seed differs between processes; forks would all draw the same."""
    import numpy

    numpy.random.seed()
