"""A run folder keeps one name for every class, and an older run resumes under a newer program."""

import sys
from types import ModuleType

import pytest
import yaml

from flextron_lit.checkpoint.run_config import as_begun, canonical, completed
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.commands import fit
from flextron_lit.commands.fit import StageCLI
from tests.front_door import ROOT

SAMPLING = "flextron_lit.callbacks.BudgetSampling"
TRAINING = "flextron_lit.stages.ElasticTraining"


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("callbacks.BudgetSampling", SAMPLING),
        ("callbacks.budget_sampling.BudgetSampling", SAMPLING),
        ("flextron_lit.callbacks.BudgetSampling", SAMPLING),
        ("flextron_lit.callbacks.budget_sampling.BudgetSampling", SAMPLING),
        ("flextron_lit.stages.elastic_training.ElasticTraining", TRAINING),
        ("flextron_lit.stages.ElasticTraining", TRAINING),
        ("flextron_lit.data.datamodule.TextDataModule", "flextron_lit.data.TextDataModule"),
        # nobody else's is even looked up
        ("torch.optim.AdamW", "torch.optim.AdamW"),
        ("no.such.module.Anywhere", "no.such.module.Anywhere"),
        ("flextron_litter.Callback", "flextron_litter.Callback"),
    ],
)
def test_every_spelling_of_a_class_is_kept_under_one_name(written, kept):
    assert canonical(written) == written, "a text that is no class path stays as it is"
    nested = {"trainer": {"callbacks": [{"class_path": written, "init_args": {"k": 2, "of": [written]}}]}}
    assert canonical(nested) == {
        "trainer": {"callbacks": [{"class_path": kept, "init_args": {"k": 2, "of": [written]}}]}
    }
    assert canonical(canonical(nested)) == canonical(nested)


def test_a_class_of_the_users_own_callbacks_keeps_its_name(monkeypatch):
    theirs = ModuleType("callbacks")
    theirs.Mine = type("Mine", (), {"__module__": "callbacks"})
    monkeypatch.setitem(sys.modules, "callbacks", theirs)
    assert canonical({"class_path": "callbacks.Mine"}) == {"class_path": "callbacks.Mine"}


def test_what_was_done_before_there_was_a_setting_is_filled_in():
    before = {"model": {"init_args": {"lr": 0.1, "clip": None}}, "seed": 0}
    then = {"model.init_args.clip": 1.0, "model.init_args.decay": 0.5, "trainer.gone": 3, "seed": 4, "new": 5}
    rows = {key: (value, None) for key, value in then.items()}
    assert completed(before, rows) == {
        "model": {"init_args": {"lr": 0.1, "clip": None, "decay": 0.5}},
        "seed": 0,
        "new": 5,
    }
    assert before == {"model": {"init_args": {"lr": 0.1, "clip": None}}, "seed": 0}
    # a row of today that every stage has
    assert completed(before)["model"]["init_args"] == before["model"]["init_args"] | {"loss_chunk": 0}
    assert completed({"seed": 0}) == {"seed": 0}


def test_a_run_of_an_older_program_goes_on_as_it_was_begun():
    rows = {"model.order": ("size", "greedy"), "model.own": (False, True), "model.tokens": (0, 8)}
    today = {"model": {"order": "greedy", "own": True, "tokens": 16}}
    # what the user asks for is not replaced, and neither is what the run said
    begun = as_begun(today, {"model": {"order": "size"}}, rows)
    assert begun == {("model", "order"): "size", ("model", "own"): False}
    assert as_begun(today, {"model": {"order": "norm"}}, rows) == {("model", "own"): False}
    # of this program
    assert as_begun(today, {"model": {"order": "size", "own": False, "tokens": 0}}, rows) == {}
    assert as_begun({"trainer": 1}, {"trainer": 1}, rows) == {}


def test_a_row_may_stand_for_every_name():
    rows = {
        "data.special": (False, None),
        "data.domains.*.format": ("text", None),
        "data.domains.*.clean": (False, True),
    }
    before = {"data": {"domains": {"a.b": {"format": "text"}, "c d": {"format": "jsonl"}}}}
    today = {
        "data": {
            "special": None,
            "domains": {"a.b": {"format": None, "clean": True}, "c d": {"format": "jsonl", "clean": True}},
        }
    }
    assert as_begun(today, before, rows) == {
        ("data", "special"): False,
        ("data", "domains", "a.b", "format"): "text",
        ("data", "domains", "a.b", "clean"): False,
        ("data", "domains", "c d", "clean"): False,
    }
    filled = completed(before, rows)["data"]
    assert filled["domains"] == {
        "a.b": {"format": "text", "clean": False},
        "c d": {"format": "jsonl", "clean": False},
    }
    assert filled["special"] is False
    # of this program, where the stage has no such setting as another row names
    assert as_begun(today, today, rows | {"model.order": ("size", "greedy")}) == {}


# --- as `fit` uses it -------------------------------------------------------------------------------------------


class EnteredError(Exception):
    """With the status of the run folder, instead of training."""


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def enter(run, monkeypatch):
    """Enter the run folder as `fit -c configs/debug.yaml` does, but for options of `begin`, and stop there."""
    begin = RunFolder.begin

    def enter(**options):
        def stop(folder, config, **usual):
            raise EnteredError(begin(folder, config, **(usual | options)))

        monkeypatch.setattr(RunFolder, "begin", stop)
        with pytest.raises(EnteredError) as entered:
            StageCLI()
        return entered.value.args[0]

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["main.py", "fit", "-c", "configs/debug.yaml", "--run_folder", str(run.path)])
    return enter


@pytest.fixture
def older(run, enter):
    """Change the config of an unfinished run."""
    assert enter() == "new"
    run.resume_state.touch()

    def older(change):
        config = run.config
        change(config)
        (run.path / "config.yaml").write_text(yaml.safe_dump(config))

    return older


def test_an_older_runs_config_is_brought_to_todays_form(enter, older):
    def written_before(config):
        sampling = config["trainer"]["callbacks"][0]
        assert sampling["class_path"] == SAMPLING
        sampling["class_path"] = "callbacks.BudgetSampling"
        del sampling["init_args"]["cost"]
        del config["model"]["init_args"]["clip_norm"]

    older(written_before)
    # the control: as it is written it is another config
    with pytest.raises(ValueError, match="with another config:\n  model.init_args.clip_norm: None -> 1.0\n  trainer.c"):
        enter(today=dict)
    assert enter() == "unfinished"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda config: config["trainer"].update(max_steps=41), "trainer.max_steps: 41 -> 40"),
        (lambda config: config["model"]["init_args"].update(gone=3), "model.init_args.gone: 3 -> None"),
    ],
    ids=["another value", "a setting that is no more"],
)
def test_what_would_be_another_run_is_refused_with_its_key(enter, older, change, line):
    older(change)
    with pytest.raises(ValueError, match=f"with another config:\n  {line}\nName another --run_folder"):
        enter()


def test_texts_are_read_as_an_older_run_began_to(enter, older, monkeypatch):
    def written_before(config):
        del config["data"]["init_args"]["special_tokens"]
        for domain in config["data"]["init_args"]["domains"].values():
            assert domain["format"] is None
            assert domain.pop("clean") is True
            domain["format"] = "text"

    older(written_before)
    # the control
    with pytest.raises(ValueError, match="data.init_args.domains.stories.clean: None -> False"):
        enter(today=dict)
    said = []
    monkeypatch.setattr(fit, "tell", said.append)
    assert enter() == "unfinished"
    (line,) = said
    for kept in ("special_tokens is False", "domains.stories.format is text", "domains.reports.clean is False"):
        assert kept in line


def test_a_name_of_a_domain_that_yaml_takes_for_something_else_is_refused_first(run, monkeypatch, enter):
    text = "{data: {init_args: {domains: {no: {source: 'generated:99'}}}}}"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "-c", text])
    with pytest.raises(
        ValueError, match="^the name of a domain is text, not .*; in YAML put it in quotes, as in 'no': or"
    ):
        StageCLI()
    assert not run.path.exists()
