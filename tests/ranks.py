"""Processes of one run, forked from the server that has loaded the libraries: two cost what one costs otherwise."""

import os
import socket
import sys
import traceback
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from tests.front_door import ENVIRONMENT, FORKS, LONGEST, ROOT, SINGLE
from tests.options import threads


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def together(function, folder, *arguments, world=2):
    """Have each rank call a function of a module with the folder and the arguments; fails with what they printed."""
    port = free_port()
    given = [(rank, world, port, function, str(folder), arguments) for rank in range(world)]
    ranks = [FORKS.Process(target=_be, args=each) for each in given]
    # the server starts with the first process
    with mock.patch.dict(os.environ, ENVIRONMENT | SINGLE):
        for rank in ranks:
            rank.start()
    for rank in ranks:
        rank.join(LONGEST)
    codes = [rank.exitcode for rank in ranks]
    with ExitStack() as stack:
        for rank in ranks:
            stack.callback(rank.kill)
    said = "\n".join(Path(folder, f"rank{rank}.log").read_text() for rank in range(world))
    assert codes == [0] * world, f"{codes}\n{said}"
    return said


def _be(rank, world, port, function, folder, arguments):
    log = os.open(Path(folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    # as torchrun does
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update(ENVIRONMENT | {name: str(value) for name, value in launched.items()})
    os.chdir(ROOT)
    try:
        import torch

        torch.set_num_threads(threads())
        function(folder, *arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # without waiting for the other ranks at exit
        os._exit(1)
