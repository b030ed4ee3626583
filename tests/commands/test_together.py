"""Runs of several processes by the command line: a network that they share out, machines, one that is lost."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flextron_lit import checkpoint
from flextron_lit.files.places import SURROGATE
from tests import ranks
from tests.front_door import ENVIRONMENT, LONGEST, MAIN, ROOT
from tests.options import seed
from tests.runs import equal, logged, weights

BATCH = {1: 4, 2: 2}
"""Blocks of a batch of each process, by their number: as many for all together."""


def killing(marker, **settings):
    """A callback that ends a process at a step, unless the marker is there."""
    init = {"marker": str(marker), "moment": "train_batch_end"} | settings
    return {"class_path": "tests.kills.KillOnce", "init_args": init}


def arguments(run, marker, *, strategy="fsdp2", devices=2, nodes=1, batch_size=None, signal_name="SIGKILL"):
    """Of `fit`, with a callback that ends the second process at the third step, unless the marker is there."""
    trainer = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    trainer |= {"strategy": strategy, "devices": devices, "num_nodes": nodes, "precision": "32-true"}
    text = {"batch_size": batch_size or BATCH[devices * nodes], "validation_tokens": 256}
    callback = json.dumps(killing(marker, step=3, rank=1, signal_name=signal_name))
    config = ("-c", "configs/debug.yaml", "-c", json.dumps({"trainer": trainer, "data": {"init_args": text}}))
    return ("fit", *config, "--run_folder", run, "--trainer.callbacks+", callback)


@pytest.fixture(scope="module")
def marker(tmp_path_factory):
    return tmp_path_factory.mktemp("marker") / "killed"


@pytest.fixture(scope="module")
def lost(tmp_path_factory, marker):
    """The run folder of a run of which one process was killed, and what the other said."""
    folder = tmp_path_factory.mktemp("lost")
    said = ranks.together(ranks.command, folder, *arguments(folder / "run", marker), codes=(2, -9))
    return folder / "run", said[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, lost, marker):
    """The run folder of the same run on two machines, which nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert marker.exists()
    ranks.together(ranks.command, folder, *arguments(folder / "run", marker, devices=1, nodes=2), nodes=2)
    return folder / "run"


@pytest.fixture
def unfinished(lost, tmp_path):
    """A copy of the run that is to be resumed."""
    return Path(shutil.copytree(lost[0], tmp_path / "run"))


def test_the_others_end_with_one_line_when_a_process_is_lost(lost):
    run, said = lost
    assert said.strip().splitlines()[-1].startswith("error: another process of this run has ended or is silent")
    assert "Traceback" not in said
    # each process has written what it holds
    assert len(list(run.glob("resume*.ckpt"))) == 2


def test_a_shared_out_run_resumes_bit_for_bit(unfinished, whole, marker):
    ranks.together(ranks.command, unfinished.parent, *arguments(unfinished, marker))
    assert equal(weights(unfinished), weights(whole))
    assert logged(unfinished)["train/full/loss"] == logged(whole)["train/full/loss"]
    assert not list(unfinished.glob("resume*"))
    checkpoint.verify(unfinished / "flextron")


def test_another_number_of_processes_goes_on_with_the_same_batches(unfinished, whole, marker):
    refused = arguments(unfinished, marker, devices=1, batch_size=2)
    said = ranks.together(ranks.command, unfinished.parent, *refused, world=1, codes=(2,))[0]
    assert "began with 4 blocks a batch on 2 processes, and cannot go on with 2 on 1" in said
    ranks.together(ranks.command, unfinished.parent, *arguments(unfinished, marker, devices=1), world=1, codes=(0,))
    found, wanted = weights(unfinished), weights(whole)
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-5


def test_a_process_that_is_asked_to_stop_stops_all_with_their_rows_written(whole, tmp_path):
    folder = tmp_path / "run"
    command = arguments(folder, tmp_path / "asked", signal_name="SIGTERM")
    # the second one was asked; the first speaks for all
    said = ranks.together(ranks.command, tmp_path, *command, codes=(143, 0))
    assert "Traceback" not in said[0] + said[1]
    assert len(list(folder.glob("resume*.ckpt"))) == 2
    assert not (folder / "flextron").exists()
    ranks.together(ranks.command, tmp_path, *command)
    assert equal(weights(folder), weights(whole))
    assert logged(folder)["train/full/loss"] == logged(whole)["train/full/loss"]


# --- streams of text ---------------------------------------------------------------------------------------------


def streaming(run, place, devices, kills):
    """Of `fit` on text that is tokenised while it is read, with notes of what each process is given."""
    trainer = {"max_steps": 9, "val_check_interval": 2, "strategy": "ddp", "devices": devices, "precision": "64-true"}
    # an epoch ends in every stretch between two kills
    lanes = {"lanes": 4, "window": 8, "epoch_tokens": 2 * 4 * 64}
    text = {"domains": {"told": {"source": str(place / "told.jsonl")}}, "streaming": lanes, "validation_tokens": 64}
    text |= {"batch_size": BATCH[devices], "test_tokens": 64}
    notes = {"class_path": "tests.kills.Given", "init_args": {"folder": str(run.with_name("given"))}}
    callbacks = json.dumps([notes, *kills])
    config = ("-c", "configs/debug.yaml", "-c", json.dumps({"trainer": trainer, "data": {"init_args": text}}))
    return ("fit", *config, "--run_folder", run, "--trainer.callbacks+", callbacks)


def given(run):
    """The blocks of every step in the order of all processes."""
    steps = sorted(run.with_name("given").glob("*-0.json"), key=lambda path: int(path.name.split("-")[0]))
    found = []
    for first in steps:
        of_ranks = [json.loads(path.read_text()) for path in sorted(first.parent.glob(f"{first.name[:-7]}-*.json"))]
        found.append([row for turn in zip(*of_ranks, strict=True) for row in turn])
    return found


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was_on_other_numbers_of_processes(tmp_path):
    draw = random.Random(seed(0))
    rows = [f"{number}: " + "".join(draw.choices("abcdefgh ", k=draw.randint(20, 400))) for number in range(200)]
    (tmp_path / "told.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    undisturbed, run = tmp_path / "undisturbed" / "run", tmp_path / "killed" / "run"
    ranks.together(ranks.command, tmp_path, *streaming(undisturbed, tmp_path, 1, []), world=1, codes=(0,))
    kills = [killing(tmp_path / "one", step=3, rank=1), killing(tmp_path / "two", step=6, rank=0)]
    for devices, codes in ((2, (2, -9)), (1, (-9,)), (2, (0, 0))):
        ranks.together(ranks.command, tmp_path, *streaming(run, tmp_path, devices, kills), world=devices, codes=codes)
    # in the order of one process: no document is lost, and none comes twice
    assert given(run) == given(undisturbed)
    assert len(given(run)) == 9
    assert len({tuple(row) for step in given(run) for row in step}) == 36
    found, wanted = weights(run), weights(undisturbed)
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-5


# --- pipelines, and torchrun -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A pipeline of two stages; in the second one a process is asked to stop, unless the marker is there."""
    folder = tmp_path_factory.mktemp("pipeline")
    trainer = {"strategy": "ddp", "devices": 2, "max_steps": 2, "val_check_interval": 2, "precision": "32-true"}
    text = {"data": {"init_args": {"validation_tokens": 256, "test_tokens": 256, "batch_size": 2}}}
    stop = killing(folder / "asked", step=1, rank=1, signal_name="SIGTERM")
    sizes = {"pairs": 8, "held_out": 2, "tokens": 64, "block_size": 64, "batch_size": 4}
    second = {"trainer": trainer | {"max_steps": 4, "callbacks": [stop]}, "model": {"init_args": sizes}}
    configs = [str(ROOT / "configs" / name) for name in ("stages/surrogate.yaml", "data/generated.yaml")]
    stages = {
        "elastic": {"configs": [str(ROOT / "configs/debug.yaml")], "settings": text | {"trainer": trainer}},
        "surrogate": {"configs": configs, "settings": text | second},
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"stages": stages}))
    return folder


def piped(pipeline, name):
    return ("pipeline", "-c", pipeline / "pipeline.yaml", "--run_folder", pipeline / name)


@pytest.fixture(scope="module")
def stopped(pipeline):
    """What its processes said, and those of the same command when they go on."""
    first = ranks.together(ranks.command, pipeline, *piped(pipeline, "stopped"), codes=(143, 0))
    return first, ranks.together(ranks.command, pipeline, *piped(pipeline, "stopped"))


def test_a_pipeline_whose_processes_were_started_from_outside(pipeline, stopped):
    (first, other), (resumed, also) = stopped
    assert "stage 2 of 2: surrogate" in first
    assert "pipeline finished: 2 of 2 stages" not in first
    assert "pipeline finished: 2 of 2 stages" in resumed
    # the first speaks for all
    assert not any("stage 1 of 2" in each or "pipeline finished" in each for each in (other, also))
    checkpoint.verify(pipeline / "stopped" / "surrogate" / "flextron")
    assert len(json.loads((pipeline / "stopped" / "pipeline.json").read_text())) == 2


@pytest.mark.slow
def test_torchrun_starts_a_pipeline(pipeline, stopped):
    assert torchrun(("--nproc_per_node", "2"), *piped(pipeline, "whole")) == [0]
    found, wanted = (pipeline / name / "surrogate" / "flextron" for name in ("stopped", "whole"))
    assert equal(weights(found.parent), weights(wanted.parent))
    assert (found / SURROGATE).read_bytes() == (wanted / SURROGATE).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_starts_two_machines(strategy, whole, marker, tmp_path):
    command = map(str, arguments(tmp_path / "run", marker, devices=1, nodes=2, strategy=strategy))
    assert torchrun(("--nnodes", "2", "--nproc_per_node", "1"), *command, nodes=2) == [0, 0]
    found, wanted = weights(tmp_path / "run"), weights(whole)
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-5


def torchrun(layout, *command, nodes=1):
    """The exit code of each machine's."""
    place = ("--master_addr", "127.0.0.1", "--master_port", str(ranks.free_port()))
    program = (sys.executable, "-m", "torch.distributed.run", *layout, *place)
    started = [
        subprocess.Popen((*program, "--node_rank", str(node), MAIN, *map(str, command)), cwd=ROOT, env=ENVIRONMENT)
        for node in range(nodes)
    ]
    return [node.wait(LONGEST) for node in started]
