"""What is forked behaves like a process of its own: scripts that stand in for `main.py` run both ways."""

import os
import signal
import subprocess
from multiprocessing import forkserver

import pytest

from tests import front_door
from tests.front_door import in_own_process, run, start

SCRIPTS = {
    "prints and succeeds": ("import sys; print('out'); print('err', file=sys.stderr)", 0),
    "output of C and of children": ("import os; os.write(1, b'raw'); os.system('echo child; echo err >&2')", 0),
    "an exit code": ("import sys; print('out'); sys.exit(3)", 3),
    "an exit message": ("import sys; sys.exit('no')", 1),
    "an uncaught error": ("print('before'); raise KeyError('lost')", 1),
    "a kill": ("import os; os.write(1, b'raw'); os.kill(os.getpid(), 9)", -signal.SIGKILL),
    "a request to stop": ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
    "what is left to the end": ("import atexit; atexit.register(print, 'last'); print('first')", 0),
    "where it is and what it is told": (
        "import os, sys; print(__name__, __file__, os.getcwd(), sys.argv, sys.path[0], sys.stdin.read(), "
        "sorted(name for name in os.environ if name not in ('_', 'LC_CTYPE')), os.environ['FLEXTRON_NOTE'])",
        0,
    ),
    "how it starts others": ("import multiprocessing as m; print(m.get_start_method())", 0),
    "threads": ("import torch; print(torch.get_num_threads(), torch.get_num_interop_threads() > 0)", 0),
}


def both(monkeypatch, tmp_path, script):
    """Of the script: what a fork does, and what a process of its own does."""
    path = tmp_path / "script.py"
    path.write_text(script)
    monkeypatch.setattr(front_door, "MAIN", str(path))
    return [way("argument", 7, FLEXTRON_NOTE="mine") for way in (run, in_own_process)]


def told(done):
    """All of it; a traceback from its last frame, since those before are of what runs the script."""
    stderr = done.stderr.rpartition("  File ")[2] if "Traceback" in done.stderr else done.stderr
    return done.returncode, done.stdout, stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fork_does_what_a_process_of_its_own_does(name, monkeypatch, tmp_path):
    script, code = SCRIPTS[name]
    forked, own = both(monkeypatch, tmp_path, script)
    assert told(forked) == told(own)
    assert own.returncode == code
    assert ("Traceback" in forked.stderr) == (name == "an uncaught error")


def test_what_is_drawn_without_a_seed_differs_between_forks(monkeypatch, tmp_path):
    script = "import numpy, random; print(numpy.random.random(), random.random())"
    drawn = [both(monkeypatch, tmp_path, script)[0].stdout.split() for _ in range(2)]
    assert not set(drawn[0]) & set(drawn[1])


def test_a_mistake_reads_the_same_both_ways():
    forked, own = (told(way("validat")) for way in (run, in_own_process))
    assert forked == own
    assert own[0] == 2


def test_the_server_has_the_libraries_and_a_single_thread(monkeypatch, tmp_path):
    script = "import os, sys; print(os.getppid(), 'lightning.pytorch' in sys.modules, 'tests.warm' in sys.modules)"
    forked, own = (done.stdout.split() for done in both(monkeypatch, tmp_path, script))
    assert forked[0] == str(forkserver._forkserver._forkserver_pid)
    assert len(os.listdir(f"/proc/{forked[0]}/task")) == 1
    assert (forked[1:], own[1:]) == (["True", "True"], ["False", "False"])


def test_a_started_one_is_waited_for_and_told_to_end(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(front_door, "MAIN", str(script))
    for end, code in ((lambda p: p.terminate(), -15), (lambda p: p.kill(), -9), (lambda p: p.send_signal(1), -1)):
        process = start()
        assert (process.poll(), process.returncode) == (None, None)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)
        os.kill(process.pid, 0)
        end(process)
        assert process.wait(timeout=60) == code
        assert process.poll() == process.returncode == code


def test_an_environment_that_libraries_have_read_already_is_refused():
    with pytest.raises(AssertionError, match="use in_own_process"):
        run("info", HF_HOME="elsewhere")
