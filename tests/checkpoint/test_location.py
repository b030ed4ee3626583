import pytest

from flextron_lit.checkpoint.location import locate
from flextron_lit.checkpoint.run_folder import RunFolder
from tests.checkpoint.conftest import write_checkpoint


def test_a_checkpoint_is_itself(written):
    location = locate(written)
    assert location.checkpoint == written
    assert location.run_folder is None
    assert str(location) == str(written)


def test_a_run_folder_means_the_checkpoint_inside(tmp_path):
    run = RunFolder(tmp_path / "run")
    write_checkpoint(run.checkpoint)
    run.begin({"seed": 0}, fresh=False)
    run.finish()
    location = locate(run.path)
    assert location.checkpoint == run.checkpoint
    assert str(location) == f"{run.checkpoint}, of the run folder {run.path} (finished)"


def unfinished(folder):
    folder.mkdir()
    RunFolder(folder).begin({"seed": 0}, fresh=False)


def pipeline(folder):
    write_checkpoint(folder / "elastic" / "flextron")


def dense(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "there is no folder .*/it"),
        (lambda folder: folder.touch(), "it is a file; name the folder"),
        (lambda folder: folder.mkdir(), "there is neither .*/it/flextron.json nor .*/it/flextron"),
        (unfinished, r"it is a run folder \(unfinished\) without a checkpoint: .*/it/flextron is written when it ends"),
        (pipeline, "holds some; name one of .*/it/elastic"),
        (dense, "it is a dense model: it has no flextron.json"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_what_is_missing(tmp_path, make, message):
    make(tmp_path / "it")
    with pytest.raises(ValueError, match=message):
        locate(tmp_path / "it")
