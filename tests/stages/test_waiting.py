from types import SimpleNamespace

import pytest

from flextron_lit.stages import data_wait as waiting


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes by hand."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: now.seconds)
    return now


def test_waiting_is_told_from_work_and_validation_is_neither(clock):
    module = waiting.WaitingForData()
    module._trainer = SimpleNamespace(training=True)

    def after(seconds, hook, *arguments):
        clock.seconds += seconds
        return hook(*arguments)

    batch = object()
    after(50, module.on_train_epoch_start)  # setting up is neither
    for _ in range(2):  # two batches that make one update
        assert after(3, module.on_before_batch_transfer, batch, 0) is batch
        after(1, module.on_train_batch_end, None, batch, 0)
    after(2, module.on_before_batch_transfer, batch, 0)
    assert after(1, module.take_seconds) == (8, 11)
    after(4, module.on_train_batch_end, None, batch, 0)  # saving the state is work, of the next update
    module._trainer.training = False
    after(7, module.on_before_batch_transfer, batch, 0)
    after(20, module.on_validation_end)
    module._trainer.training = True
    after(2, module.on_before_batch_transfer, batch, 0)
    assert after(4, module.take_seconds) == (2, 10)
