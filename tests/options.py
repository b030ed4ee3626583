"""What `pytest --seed N --threads N` asks for: read here by tests, fixtures and the processes that they start."""

import os

SEED, THREADS = "FLEXTRON_TESTS_SEED", "FLEXTRON_TESTS_THREADS"


def seed(base):
    """The seed of random weights or tokens: without `--seed` it is this one."""
    return base + int(os.environ.get(SEED, "0"))


def threads():
    """How many threads torch computes with."""
    return int(os.environ.get(THREADS, "1"))
