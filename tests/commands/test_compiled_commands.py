"""`--compile` of the commands that have it, in process: the graphs themselves stand in for what a compiler makes."""

import json
import shutil

import pytest

from flextron_lit import checkpoint
from flextron_lit.commands import evaluate, generate, profile, select
from flextron_lit.elastic.compiled.widths import CompiledWidths
from flextron_lit.latency.latency_table import read_all
from tests.served import write

REQUEST = ("--prompt_tokens", "12", "--generated_tokens", "4", "--threads", "1")
COMMANDS = {"profile": profile, "select": select, "generate": generate, "evaluate": evaluate}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return write(tmp_path_factory.mktemp("served") / "flextron")


@pytest.fixture
def folder(served, tmp_path):
    """A checkpoint with no latency table."""
    copied = shutil.copytree(served, tmp_path / "flextron")
    shutil.rmtree(copied / "costs", ignore_errors=True)
    return copied


@pytest.fixture
def main(folder, capsys, as_traced, monkeypatch):
    """Standard output and standard error of a command line, and how many layers ran by compiled code."""
    ran = []
    run = CompiledWidths.run
    monkeypatch.setattr(CompiledWidths, "run", lambda *given: ran.append(run(*given)) or ran[-1])

    def called(name, *options):
        ran.clear()
        COMMANDS[name].command(["--checkpoint", str(folder), *map(str, options)])
        captured = capsys.readouterr()
        return captured.out, captured.err, sum(found is not None for found in ran)

    return called


def test_profile_measures_both_modes_and_budgets_go_by_the_one_that_is_asked_for(main, folder):
    said, _, compiled = main("profile", "--compile", *REQUEST, "--seconds", 0.01, "--held_out", 0)
    assert compiled
    tables = {table.compiled: table for table in read_all(folder, checkpoint.read(folder).space).values()}
    assert set(tables) == {False, True}
    assert "budgets of latency reach down to" in said
    for mode, options in ((False, ()), (True, ("--compile",))):
        # one that is met whatever was measured
        said, _, ran = main("select", "--budget", "latency=1.0", "--search", "uniform", "--json", *options)
        cost = json.loads(said)["costs"]["latency"]
        table = tables[mode].tables()["latency"]
        assert cost["cost"] == pytest.approx(cost["ratio"] * table.full)
        # costs are looked up
        assert not ran


def test_generate_writes_the_same_by_compiled_code(main):
    options = ("--prompt", "Ada feeds the owl", "--budget", "parameters=0.6", "--max_new_tokens", 6)
    plain, _, none = main("generate", *options)
    text, told, compiled = main("generate", *options, "--compile")
    assert text == plain
    assert (none, "not compiled" in told) == (0, False)
    assert compiled


def test_evaluate_measures_the_same_by_compiled_code(main, tmp_path):
    (tmp_path / "owl.txt").write_text("Ada feeds the owl at the mill. " * 60)
    losses = []
    for number, mode in enumerate(((), ("--compile",))):
        output = tmp_path / str(number)
        text = ("--text", tmp_path / "owl.txt", "--tokens", 256, "--output", output)
        said, _, compiled = main(
            "evaluate", "--budgets", "0.8", "--networks", "static", *text, "--json", "--no_report", *mode
        )
        assert bool(compiled) == bool(mode)
        content = json.loads((output / "evaluation.json").read_text())
        assert content["losses"]["made"].get("compiled", False) == bool(mode)
        losses.append({row["network"]: row["loss"] for row in json.loads(said)["losses"]})
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0]["full"] != pytest.approx(losses[0]["static"], abs=1e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("profile", ("--dynamic",)),
        ("generate", ("--prompt", "a", "--budget", "0.6", "--dynamic")),
        ("generate", ("--prompt", "a", "--budget", "0.6", "--speculative", "0.3")),
    ],
)
def test_what_runs_the_network_as_it_is_refuses_it(main, name, options):
    with pytest.raises(ValueError, match="--compile has no effect with --"):
        main(name, *options, "--compile")
