import errno
import fcntl
import multiprocessing
import os
import platform

import pytest

from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.files.differences import differences

CONFIG = {"model": {"lr": 0.1, "layers": [1, 2]}, "seed": 0}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


def test_a_run_begins_resumes_and_ends(folder):
    assert folder.status == "new"
    assert folder.begin(CONFIG, fresh=False) == "new"
    folder.resume_state.touch()
    assert folder.begin(CONFIG, fresh=False) == "unfinished"
    folder.checkpoint.mkdir()
    folder.finish()
    assert not folder.resume_state.exists()
    assert folder.begin(CONFIG, fresh=False) == "finished"


def test_a_finished_run_without_its_checkpoint_says_so(folder):
    folder.begin(CONFIG, fresh=False)
    folder.finish()
    with pytest.raises(ValueError, match="is finished, but its checkpoint .* is not there: put it back, or .* --fresh"):
        folder.begin(CONFIG, fresh=False)
    assert folder.begin(CONFIG, fresh=True) == "new"


def test_a_run_that_did_nothing_binds_no_folder(folder):
    mistyped, corrected = ({"model": {"init_args": {"checkpoint": name}}} for name in ("typo", "model"))
    folder.begin(mistyped, fresh=False)
    assert folder.started_from is None
    assert folder.begin(corrected, fresh=False) == "new"
    assert folder.config == corrected
    # the control: with something to lose
    folder.resume_state.touch()
    assert folder.started_from == "model"
    with pytest.raises(ValueError, match="checkpoint: 'model' -> 'typo'"):
        folder.begin(mistyped, fresh=False)


def test_another_config_is_refused_with_its_keys(folder):
    folder.begin(CONFIG, fresh=False)
    folder.resume_state.touch()
    changed = {"model": {"lr": 0.2, "layers": [1, 2], "new": 3}, "seed": 0}
    with pytest.raises(ValueError, match=r"model.lr: 0.1 -> 0.2\n  model.new: None -> 3") as error:
        folder.begin(changed, fresh=False)
    assert "seed" not in str(error.value)
    assert folder.begin(changed, fresh=True) == "new"
    folder.resume_state.touch()
    assert folder.begin(changed, fresh=False) == "unfinished"


def test_a_run_killed_before_its_first_saved_state_starts_over(folder):
    folder.begin(CONFIG, fresh=False)
    (folder.path / "training.json").touch()
    assert folder.begin(CONFIG, fresh=False) == "new"
    assert not (folder.path / "training.json").exists()
    assert folder.status == "unfinished"


def test_fresh_deletes_a_run_but_nothing_else(folder):
    folder.begin(CONFIG, fresh=False)
    (folder.path / "tensorboard").mkdir()
    (folder.path / "tensorboard" / "events").touch()
    folder.begin(CONFIG, fresh=True)
    assert sorted(p.name for p in folder.path.iterdir()) == ["config.yaml", "status.json"]
    stranger = RunFolder(folder.path.parent)
    with pytest.raises(ValueError, match="is not a run folder"):
        stranger.begin(CONFIG, fresh=True)
    assert (folder.path / "config.yaml").exists()


def test_one_process_at_a_time(folder):
    again = RunFolder(folder.path)
    # not the first time: what an earlier process left there is no longer so
    (folder.path / ".lock").write_text("process 1 on elsewhere, whose name is long\n")
    holder = rf"^process {os.getpid()} on {platform.node()} is working in"
    with folder.lock(), pytest.raises(ValueError, match=holder) as refused, again.lock():
        pass
    assert "\n" not in str(refused.value)
    with folder.lock():
        assert folder.path.exists()


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(folder):
    # as a loader's worker, which outlives a killed run
    forks = multiprocessing.get_context("fork")
    begun, ended = forks.Event(), forks.Event()
    with folder.lock():
        worker = forks.Process(target=lambda: (begun.set(), ended.wait()))
        worker.start()
        begun.wait()
    try:
        with folder.lock():
            assert worker.is_alive()
    finally:
        ended.set()
        worker.join()


def test_where_there_are_no_locks_that_is_said(folder, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level("INFO", logger="flextron_lit"), folder.lock():
        assert f"nothing keeps a second run out of {folder.path}" in caplog.text


def test_a_path_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write to the run folder"), RunFolder(tmp_path / "file" / "run").lock():
        pass


def test_differences_name_every_key_once():
    assert list(differences({"a": 1, "b": {"c": [1]}}, {"b": {"c": [2]}, "d": None})) == [
        "a: 1 -> None",
        "b.c: [1] -> [2]",
    ]
    assert list(differences(CONFIG, dict(CONFIG))) == []
