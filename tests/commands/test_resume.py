"""A run that was killed and started again by the same command ends like one that was not."""

import json
import random
import signal
import time

import pytest
import yaml

from tests.front_door import ROOT, in_own_process, run, start, succeed
from tests.runs import compared_by, equal, logged, table, weights

STEPS = 12
SHORT = {"trainer": {"max_steps": STEPS, "val_check_interval": 6}}
BY_EPOCH = {
    "trainer": {"max_steps": STEPS, "limit_train_batches": 5, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
}
WORKERS = {**SHORT, "data": {"init_args": {"num_workers": 2}}}
RANKS = {"trainer": {**SHORT["trainer"], "devices": 2, "strategy": "ddp"}}
# the network writes half of the text itself, before it has learned anything
ACCUMULATED = {**SHORT, "model": {"init_args": {"accumulate": 3, "written": 0.5}}}

# name -> settings on top of debug.yaml, the moment, the step, the signal
CASES = {
    "mid-epoch": (SHORT, "train_batch_end", 8, "SIGKILL"),
    "asked to stop": (SHORT, "train_batch_end", 8, "SIGTERM"),
    "between accumulated batches": (ACCUMULATED, "train_batch_start", 7, "SIGTERM"),
    "end of an epoch": (BY_EPOCH, "train_epoch_end", 10, "SIGKILL"),
    "asked to stop at the end of an epoch": (BY_EPOCH, "train_epoch_end", 10, "SIGTERM"),
    "first table": (SHORT, "sanity_batch_start", 0, "SIGKILL"),
    "validation": (SHORT, "validation_batch_start", 6, "SIGKILL"),
    "asked to stop during validation": (SHORT, "validation_batch_start", 6, "SIGTERM"),
    "last validation": (SHORT, "validation_batch_start", STEPS, "SIGKILL"),
    "saving the state": (SHORT, "save_checkpoint", 10, "SIGKILL"),
    "before the checkpoint is written": (SHORT, "fit_end", STEPS, "SIGKILL"),
    "several workers": (WORKERS, "train_batch_end", 8, "SIGKILL"),
    "two ranks": (RANKS, "train_batch_end", 8, "SIGKILL"),
    "two ranks, asked to stop": (RANKS, "train_batch_end", 8, "SIGTERM"),
}


def arguments(settings, folder, marker, moment="fit_end", step=10**6, signal_name="SIGKILL"):
    init = {"marker": str(marker), "moment": moment, "step": step, "signal_name": signal_name}
    kill = json.dumps({"class_path": "tests.kills.KillOnce", "init_args": init})
    config = ("-c", "configs/debug.yaml", "-c", json.dumps(settings))
    return ("fit", *config, "--run_folder", folder, "--trainer.callbacks+", kill)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Run folder of an undisturbed run under given settings, made once for each."""
    made = {}

    def folder(settings):
        key = json.dumps(settings)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            # where ranks start each other, once as a user starts them
            way = in_own_process if settings is RANKS else run
            done = way(*arguments(settings, made[key], made[key].parent / "never"))
            assert done.returncode == 0, done.stdout + done.stderr
        return made[key]

    return folder


# what another case goes through as well
SLOW = {"mid-epoch", "asked to stop at the end of an epoch", "two ranks", "two ranks, asked to stop"}


@pytest.mark.parametrize("case", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in CASES])
def test_a_killed_run_ends_like_an_undisturbed_one(case, undisturbed, tmp_path):
    settings, moment, step, signal_name = CASES[case]
    folder, marker = tmp_path / "run", tmp_path / "marker"
    command = arguments(settings, folder, marker, moment, step, signal_name)
    killed = run(*command)
    assert killed.returncode not in (0, 2), killed.stdout + killed.stderr
    if "ranks" not in case:
        assert killed.returncode == (-signal.SIGKILL if signal_name == "SIGKILL" else 143)
    assert marker.exists(), killed.stdout + killed.stderr
    assert not (folder / "flextron").exists()
    succeed(*command)
    reference = undisturbed(settings)
    assert equal(weights(folder), weights(reference))
    assert table(folder) == table(reference)
    assert logged(folder) == logged(reference)
    # the settings name when to kill
    assert compared_by(folder)[1] == compared_by(reference)[1]
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("settings", [ACCUMULATED, pytest.param(RANKS, marks=pytest.mark.slow)])
def test_other_settings_would_end_elsewhere(settings, undisturbed):
    assert not equal(weights(undisturbed(SHORT)), weights(undisturbed(settings)))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_of_a_pipeline(tmp_path):
    """From an empty cache: tokenising, training, validating, writing. Prints when each kill came (pytest -s)."""
    config = tmp_path / "pipeline.yaml"
    stage = {"configs": [str(ROOT / "configs/debug.yaml")], "settings": SHORT}
    config.write_text(yaml.safe_dump({"stages": {"one": stage, "two": stage}}))

    def command(name):
        return ("pipeline", "-c", config, "--run_folder", tmp_path / name)

    def cache(name):
        return {"FLEXTRON_CACHE": str(tmp_path / f"{name}-cache")}

    begun = time.monotonic()
    succeed(*command("undisturbed"), **cache("undisturbed"))
    seconds = time.monotonic() - begun
    draw = random.Random(0)
    for number in range(20):
        name = f"killed{number}"
        # imports take the first seconds and leave nothing to damage
        delay = seconds * draw.uniform(0.25, 0.97)
        process = start(*command(name), **cache(name))
        time.sleep(delay)
        process.kill()
        process.wait()
        left = traces(tmp_path / name, tmp_path / f"{name}-cache")
        print(f"kill {number + 1} after {delay:.1f} of {seconds:.1f} s: {left}")
        succeed(*command(name), **cache(name))
        for one in ("one", "two"):
            assert equal(weights(tmp_path / name / one), weights(tmp_path / "undisturbed" / one)), name
            assert table(tmp_path / name / one) == table(tmp_path / "undisturbed" / one), name
            assert logged(tmp_path / name / one) == logged(tmp_path / "undisturbed" / one), name


def traces(folder, cache):
    """What a kill interrupted, from what it left."""
    partial = [p.name for p in (*folder.rglob("*.partial"), *cache.rglob("*.partial"))]
    logs = [logged(p.parent).get("train/full/loss", []) for p in folder.rglob("tensorboard")]
    steps = [max((step for step, _ in scalars), default=0) for scalars in logs]
    domains = len(list(cache.glob("tokens/*.lock")))
    return f"{domains} domains begun, steps logged a stage {steps}, half written {partial}"
