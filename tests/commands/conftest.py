"""What tests of commands that read checkpoints share with those of the checkpoint."""

from tests.checkpoint.conftest import written  # noqa: F401  # a fixture
