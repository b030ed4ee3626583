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


def together(function, folder, *arguments, world=2, nodes=1, codes=(0, 0)):
    """Have each rank call a function of a module with the folder and the arguments; returns what each printed.

    `codes` are the exit codes that they must end with, `nodes` the machines that they believe to be on.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    port = free_port()
    given = [(rank, world, nodes, port, function, str(folder), arguments) for rank in range(world)]
    ranks = [FORKS.Process(target=_be, args=each) for each in given]
    # the server starts with the first process
    with mock.patch.dict(os.environ, ENVIRONMENT | SINGLE):
        for rank in ranks:
            rank.start()
    with ExitStack() as stack:
        for rank in ranks:
            stack.callback(rank.kill)
        for rank in ranks:
            rank.join(LONGEST)
        found = tuple(rank.exitcode for rank in ranks)
    said = [Path(folder, f"rank{rank}.log").read_text() for rank in range(world)]
    assert found == codes, f"{found}\n" + "\n".join(said)
    return said


def command(folder, *arguments):
    """Of a rank: be `python main.py` with these arguments."""
    from flextron_lit.commands import main

    sys.argv = [str(ROOT / "main.py"), *map(str, arguments)]
    raise SystemExit(main())


def _be(rank, world, nodes, port, function, folder, arguments):
    log = os.open(Path(folder, f"rank{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    # as torchrun does
    here = world // nodes
    launched = {"RANK": rank, "LOCAL_RANK": rank % here, "GROUP_RANK": rank // here}
    launched |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": here}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update(ENVIRONMENT | {name: str(value) for name, value in launched.items()})
    os.chdir(ROOT)
    try:
        import torch
        from lightning.pytorch.utilities import rank_zero_only

        # it read the environment as the server loaded it
        rank_zero_only.rank = rank
        torch.set_num_threads(threads())
        function(folder, *arguments)
    except SystemExit as ended:
        os._exit(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        # without waiting for the other ranks at exit
        os._exit(1)
