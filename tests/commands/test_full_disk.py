"""A disk that is full wherever a run writes: one line that names the file, and the same command goes on afterwards."""

import json
import re
import subprocess

import pytest

from tests.front_door import ROOT, run, succeed
from tests.runs import equal, logged, table, weights

SHORT = {"trainer": {"max_steps": 6, "val_check_interval": 3}}


def command(folder):
    return ("fit", "-c", ROOT / "configs/debug.yaml", "-c", json.dumps(SHORT), "--run_folder", folder / "run")


@pytest.fixture
def mounted():
    """Makes a small disk of a folder; needs to be root."""
    places = []

    def mount(folder, kilobytes):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], check=False)
        if done.returncode:
            pytest.skip("mounting is not permitted here")
        places.append(folder)

    yield mount
    for place in places:
        subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    succeed(*command(folder), FLEXTRON_CACHE=str(folder / "cache"))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "kilobytes", "named"),
    [
        ("cache", 32, r"\[Errno 28\] No space left on device: '\S+/cache/tokens/[0-9a-f]+'"),
        ("run", 48, r"\[Errno 28\] No space left on device: '\S+/run/training\.\w+'"),
        ("run", 700, r"cannot save the state of the run in \S+/run/resume.ckpt"),
        ("run/tensorboard", 4, r"\[Errno 28\] No space left on device: '\S+/run'"),
    ],
)
def test_the_same_command_goes_on_when_there_is_room(tmp_path, mounted, undisturbed, place, kilobytes, named):
    mounted(tmp_path / place, kilobytes)
    cache = {"FLEXTRON_CACHE": str(tmp_path / "cache")}
    stopped = run(*command(tmp_path), **cache)
    assert stopped.returncode == 2
    last = stopped.stderr.strip().splitlines()[-1]
    assert re.match(f"error: {named}.*: make room, then run the same command again", last)
    assert "Traceback" not in stopped.stderr
    assert not [*tmp_path.rglob("*.partial")]
    # a run that begins anew deletes what it logged, but no disk can be deleted
    room = ["umount", "-l"] if place == "run/tensorboard" else ["mount", "-o", "remount,size=64m"]
    subprocess.run([*room, tmp_path / place], check=True)
    succeed(*command(tmp_path), **cache)
    assert equal(weights(tmp_path / "run"), weights(undisturbed))
    assert table(tmp_path / "run") == table(undisturbed)
    assert logged(tmp_path / "run") == logged(undisturbed)
