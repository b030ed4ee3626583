"""The process that has started this one as a further rank, and that it does not outlive."""

import ctypes
import os
import signal
import sys

STARTER = "FLEXTRON_STARTER"
"""Its number, for those that it starts."""
SUPERVISED = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")
"""Marks of torchrun and SLURM, which look after the ranks that they start."""
PARENT_DIED = 1
"""`PR_SET_PDEATHSIG` of Linux' prctl."""


def end_with_starter() -> None:
    """Have a further rank killed when the first one, which has started it, ends in whatever way.

    A first rank that is killed before they know of each other would leave the others waiting for half an hour.
    """
    starter = os.environ.get(STARTER)
    os.environ[STARTER] = str(os.getpid())
    further = os.environ.get("LOCAL_RANK", "0") != "0" and not any(name in os.environ for name in SUPERVISED)
    if starter is None or not further or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    if os.getppid() != int(starter):
        sys.exit("the process that started this one has ended")
