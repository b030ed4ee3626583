"""Runs of several processes by the command line: a network that they share out, machines, one that is lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flextron_lit import checkpoint
from tests import ranks
from tests.front_door import ENVIRONMENT, LONGEST, MAIN, ROOT
from tests.runs import equal, logged, weights

BATCH = {1: 4, 2: 2}
"""Blocks of a batch of each process, by their number: as many for all together."""


def arguments(run, marker, *, strategy="fsdp2", devices=2, nodes=1, batch_size=None):
    """Of `fit`, with a callback that kills the second process at the third step, unless the marker is there."""
    trainer = {"max_steps": 4, "val_check_interval": 2, "log_every_n_steps": 1}
    trainer |= {"strategy": strategy, "devices": devices, "num_nodes": nodes, "precision": "32-true"}
    text = {"batch_size": batch_size or BATCH[devices * nodes], "validation_tokens": 256}
    kill = {"marker": str(marker), "moment": "train_batch_end", "step": 3, "rank": 1}
    callback = json.dumps({"class_path": "tests.kills.KillOnce", "init_args": kill})
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


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_starts_two_machines(strategy, whole, marker, tmp_path):
    port = str(ranks.free_port())
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1")
    command = (MAIN, *map(str, arguments(tmp_path / "run", marker, devices=1, nodes=2, strategy=strategy)))
    place = ("--master_addr", "127.0.0.1", "--master_port", port)
    nodes = [
        subprocess.Popen((*torchrun, *place, "--node_rank", str(node), *command), cwd=ROOT, env=ENVIRONMENT)
        for node in range(2)
    ]
    assert [node.wait(LONGEST) for node in nodes] == [0, 0]
    found, wanted = weights(tmp_path / "run"), weights(whole)
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-5
