"""Files that have gone wrong in every way: what commands read, mutated, and what reading it says."""

import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock
from unittest.mock import DEFAULT

import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from flextron_lit import checkpoint, commands
from flextron_lit.checkpoint.in_memory import load_elastic
from flextron_lit.checkpoint.resume_io import BLOCKS, StreamedCheckpointIO, check_processes, read_state
from flextron_lit.checkpoint.run_folder import RunFolder
from flextron_lit.elastic import ElasticBackbone
from flextron_lit.evaluation.results import Results
from flextron_lit.export.writing import read_selection
from flextron_lit.files.damage import DamageError
from flextron_lit.files.whole_file import write_json
from flextron_lit.latency.latency_table import find, read_all
from flextron_lit.report.evaluated_networks import noted
from flextron_lit.report.summary import answered
from flextron_lit.routers.excess import ExcessTable
from flextron_lit.routers.from_budget import DynamicRouting
from flextron_lit.routers.pairs import Pairs
from flextron_lit.routers.surrogate import Surrogate
from flextron_lit.routers.trained import TrainedSurrogate
from flextron_lit.sources import load_dense
from tests import served
from tests.conftest import with_compensation
from tests.front_door import ROOT
from tests.mutations import mutated

LONGEST = 60
"""Seconds that reading a file may take."""
MOST = 400
"""Megabytes by which it may raise the process's peak."""
RECORD = {"stage": "ElasticTraining", "steps": 9, "tokens": 512, "seed": 7, "source": "x", "git_commit": "abcdef01"}
TEXT = {"domains": {"stories": {"source": "generated:1", "weight": 1.0, "tokens": {"train": 5}}}, "block_size": 64}

WATCHED = {"uniform": [{"mlp": 0.5, "attention": 1.0}], "random_costs": [0.71], "seed": 0}
CONFIG = {"model": {"init_args": {"checkpoint": "x", "validation": WATCHED}}, "trainer": {"devices": 1}}
CONFIG |= {"data": {"init_args": {"batch_size": 4, "domains": {}}}}


UNBOUND = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
"""Of hypothesis: nothing is kept, and nothing is too slow for it."""


class HangError(BaseException):
    """It took too long."""


# --- what is read -----------------------------------------------------------------------------------------------


def make(folder):
    """A pipeline of one finished stage, with every file that commands read; nothing was trained."""
    stage = folder / "pipeline/stage"
    flextron, backbone = stage / "flextron", ElasticBackbone(load_dense(served.TINY), served.SPACE)
    space = backbone.space
    with_compensation(backbone)
    routers = (served.static_router, served.dynamic_router, served.latency_router)
    files = {name: content for made in routers for name, content in made(backbone).files().items()}
    files["elastic/surrogate.safetensors"] = surrogate(space).to_bytes()
    rows = tuple(tuple(1.0 - place / (len(b.widths) - 1) for place in range(len(b.widths))) for b in space.blocks)
    files["elastic/excess_losses.json"] = ExcessTable(rows, 64).to_bytes(space)
    order = [torch.arange(block.full).flip(0) for block in space.blocks]
    history = [{**RECORD, "data": TEXT}]
    tokenizer = served.load_tokenizer(served.TINY)
    checkpoint.write(flextron, backbone, tokenizer, order=order, history=history, files=files)
    served.latency_table(backbone, 16).write(flextron)
    # digests would notice all there is to notice before it is read
    record = json.loads((flextron / "flextron.json").read_text())
    write_json(flextron / "flextron.json", {name: row for name, row in record.items() if name != "sha256"})
    results = folder / "pipeline/evaluation"
    evaluation(results, flextron, space)
    widths = dict(zip((block.name for block in space.blocks), space.widths(space.full()), strict=True))
    chosen = {"sub_network": space.full().to_json(), "widths": widths, "budget": "0.9", "how": "a look-up"}
    write_json(folder / "selection.json", chosen)
    run_files(folder, stage)
    return folder


def surrogate(space):
    """With four pairs and two blocks of text."""
    generator = torch.Generator().manual_seed(0)
    pairs = Pairs.of([space.random(generator) for _ in range(4)], [4.0, 3.5, 3.0, 2.5])
    text = {name: torch.ones(2, 8, dtype=torch.long) for name in ("input_ids", "position_ids", "labels")}
    return TrainedSurrogate(Surrogate(space, 4, generator), "log_excess", 2.0, pairs, text, settings={"hidden": 4})


def evaluation(folder, flextron, space):
    """Losses of the full network on a text, noted in the checkpoint."""
    made = {"command": "x", "date": "2026", "device": {"type": "cpu", "name": "x"}, "dtype": "float32", "versions": {}}
    row = {"network": "full", "budget": None, "text": "all texts", "loss": 2.0, "interval": [1.9, 2.1]}
    row |= {"sub_network": space.full().to_json(), "costs": {}, "over_full": None, "over_static": None}
    row |= {"perplexity": 7.4, "tokens": 64, "documents": 2}
    results = Results(folder, checkpoint.digest(flextron), {"made": made, "asked": {}, "rows": [row]})
    write_json(results.path, {"checkpoint": results.sha256, "losses": results.losses, "tasks": []})
    results.note_in(flextron, made)


def run_files(folder, stage):
    """Config, status, tables, state."""
    (stage / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    write_json(stage / "status.json", {"finished": True})
    row = {"loss": 3.0, "perplexity": 1.0, "parameters": 100.0, "cost_ratio": 1.0}
    row |= {"mlp_width": 1.0, "attention_width": 1.0, "domain": "stories"}
    watched = ("full", "mlp50", "routed0.90", "dynamic0.80", "random0.71")
    write_json(stage / "training.json", [{"step": 9, "sub_network": name, **row} for name in watched])
    summary = {"name": "full", "budget": 1.0, "router": "", "losses": {"stories": 2.0}, "latency_ms": 12.0}
    summary |= {"mlp_width": 1.0, "attention_width": 1.0, "parameters": 100, "cost": ""}
    write_json(folder / "pipeline/summary.json", [summary, {**summary, "name": "routed0.90", "router": "static"}])
    write_json(folder / "pipeline/pipeline.json", [{"command": "x", "date": "2026", "machine": "x"}])
    unfinished = folder / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    write_json(unfinished / "status.json", {"finished": False})
    state = {"epoch": 0, "global_step": 5, "state_dict": {"w": torch.ones(3, 4)}, "random_state": [{"python": [1]}]}
    StreamedCheckpointIO().save_checkpoint(state | {BLOCKS: 4, "loops": {"fit_loop": {}}}, unfinished / "resume.ckpt")
    fit = yaml.safe_load((ROOT / "configs/debug.yaml").read_text())
    fit["model"]["init_args"]["checkpoint"] = served.TINY
    (folder / "fit.yaml").write_text(yaml.safe_dump(fit, sort_keys=False))
    pipeline = yaml.safe_load((ROOT / "configs/debug_pipeline.yaml").read_text())
    for each in pipeline["stages"].values():
        each["configs"] = [str(ROOT / "configs" / name) for name in each["configs"]]
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    shutil.copytree(stage, folder / "reference")


# --- who reads it -----------------------------------------------------------------------------------------------

FLEXTRON = "pipeline/stage/flextron"


def cli(*arguments):
    """A command in this process."""

    def read(folder):
        given = [str(folder / each[1:]) if each.startswith("@") else each for each in arguments]
        with mock.patch.object(sys, "argv", ["main.py", *given]):
            # as `main` has it, but for what it makes a line of
            name = commands.COMMANDS[given[0]][0]
            return commands.importlib.import_module(f"flextron_lit.commands.{name}").command(given[1:])

    return read


def fit(folder):
    """Config, run folder, trainer settings: all before anything is built."""
    from flextron_lit.commands.fit import StageCLI

    nothing = dict.fromkeys(("instantiate_classes", "_run_subcommand"), DEFAULT)
    with mock.patch.multiple(StageCLI, **nothing):
        cli("fit", "-c", "@fit.yaml", "--run_folder", "@new")(folder)


def pipeline(folder):
    from flextron_lit.commands import pipeline as module

    nothing = dict.fromkeys(("_fit", "summarise", "report_pipeline"), DEFAULT)
    with mock.patch.multiple(module, **nothing):
        cli("pipeline", "-c", "@pipeline.yaml", "--run_folder", "@new")(folder)


def resumed(folder):
    """As a run enters its folder and looks at its state."""
    run = RunFolder(Path(shutil.copytree(folder / "unfinished", folder / "new")))
    run.begin(CONFIG, fresh=False)


def state(folder):
    run = RunFolder(folder / "unfinished")
    check_processes(read_state(run.resume_state, whole=False), run.resume_state, 1, 4)
    read_state(run.resume_state)


def space_of(folder):
    return checkpoint.read(folder / FLEXTRON).space


def tables(folder):
    read_all(folder / FLEXTRON, space_of(folder))
    find(folder / FLEXTRON, {})


def results(folder):
    Results.read(folder / "pipeline/evaluation", checkpoint.digest(folder / FLEXTRON), fresh=False)
    noted(folder / FLEXTRON, [])


def extended(folder):
    checkpoint.extend(folder / FLEXTRON, folder / "new", files={"costs/x.json": b"{}"})


INFO, DIFF = cli("info", "@pipeline/stage"), cli("diff", "@pipeline/stage", "@reference")
REPORT = cli("report", "@pipeline", "--no_texts", "--output", "@new")


def selected(budget):
    return cli("select", "--checkpoint", f"@{FLEXTRON}", "--budget", budget, "--latency", "latency-cpu-1x16+64-float32")


TARGETS = {
    f"{FLEXTRON}/flextron.json": (INFO, DIFF, selected("parameters<=0.7"), extended, REPORT, results),
    f"{FLEXTRON}/config.json": (INFO, selected("parameters<=0.7"), lambda f: load_elastic(str(f / FLEXTRON))),
    f"{FLEXTRON}/costs/latency-*.json": (tables, selected("latency<=0.7"), REPORT),
    f"{FLEXTRON}/routers/static-parameters*.json": (INFO, selected("parameters<=0.7"), REPORT),
    f"{FLEXTRON}/routers/static-parameters*.safetensors": (selected("parameters<=0.7"),),
    f"{FLEXTRON}/routers/dynamic-flops*.json": (
        INFO,
        lambda f: DynamicRouting.read(f / FLEXTRON, space_of(f)).routers["flops"].policy([0.8]),
        REPORT,
    ),
    f"{FLEXTRON}/routers/dynamic-flops*.safetensors": (lambda f: DynamicRouting.read(f / FLEXTRON, space_of(f)),),
    f"{FLEXTRON}/elastic/surrogate.safetensors": (INFO, selected("kv_bytes<=0.7")),
    f"{FLEXTRON}/elastic/excess_losses.json": (selected("kv_bytes<=0.7"),),
    f"{FLEXTRON}/elastic/order.safetensors": (INFO, DIFF),
    f"{FLEXTRON}/elastic/compensation.safetensors": (INFO, lambda f: load_elastic(str(f / FLEXTRON))),
    f"{FLEXTRON}/model.safetensors": (INFO, lambda f: load_elastic(str(f / FLEXTRON))),
    "selection.json": (lambda f: read_selection(f / "selection.json", space_of(f)),),
    "pipeline/evaluation/evaluation.json": (results, REPORT),
    "pipeline/stage/training.json": (lambda f: answered([RunFolder(f / "pipeline/stage")]), REPORT),
    "pipeline/stage/config.yaml": (REPORT,),
    "pipeline/stage/status.json": (INFO, REPORT),
    "pipeline/summary.json": (REPORT,),
    "pipeline/pipeline.json": (REPORT,),
    "unfinished/config.yaml": (resumed,),
    "unfinished/status.json": (resumed,),
    "unfinished/resume.ckpt": (state,),
    "fit.yaml": (fit,),
    "pipeline.yaml": (pipeline,),
}
"""Files (the first that a pattern finds), and what reads them."""
SLOW = {"fit.yaml": 4, "pipeline.yaml": 2, f"{FLEXTRON}/config.json": 2, f"{FLEXTRON}/flextron.json": 2}
"""Of these, one in so many."""

# --- what is said of it -----------------------------------------------------------------------------------------


@dataclass
class Found:
    """How many files were read, by what became of them, and what should not have been."""

    counts: Counter = field(default_factory=Counter)
    wrong: dict = field(default_factory=dict)
    """An example of each kind: what was said, and what the file held."""

    def add(self, pattern, content, error, grown):
        """What reading ended with: None for a result, else an error; and by how many megabytes it raised the peak."""
        foreign = error is not None and not own(error)
        self.counts["accepted" if error is None else "foreign" if foreign else "refused"] += 1
        example = str(error)[:300], content, "".join(traceback.format_exception(error))
        if foreign:
            self.wrong.setdefault((pattern, *place_of(error)), example)
        # a run with another config is told in lines, one for each setting
        if isinstance(error, ValueError) and "\n" in str(error) and "with another config" not in str(error):
            self.wrong.setdefault((pattern, "several lines", *place_of(error)), example)
        if grown > MOST:
            self.wrong.setdefault((pattern, f"{grown:.0f} MB"), example)


def own(error):
    """Whether an error is one that a command makes a line of, and says which file it is about."""
    if isinstance(error, SystemExit):
        # of the parser of configs, which says what is wrong with them
        return error.code in (0, 2)
    if isinstance(error, OSError):
        return error.filename is not None
    if type(error) in (UnicodeDecodeError, RecursionError):
        # `main` says what they mean
        return not any(frame.name in ("damage", "read_json") for frame in traceback.extract_tb(error.__traceback__))
    raised = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return type(error) in (ValueError, DamageError) and raised.is_relative_to(ROOT)


def place_of(error):
    """Where in our code an error came through last."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "flextron_lit/" in f.filename]
    return type(error).__name__, f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""


def peak():
    """Of this process, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def tried(read, folder):
    """What reading ends with: None for a result, else an error."""

    def hang(*_):
        raise HangError

    earlier = signal.signal(signal.SIGALRM, hang)
    signal.alarm(LONGEST)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except BaseException as error:
        return error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, earlier)
        new = folder / "new"
        if new.exists():
            shutil.rmtree(new) if new.is_dir() else new.unlink()
    return None


def read_as(content, pattern, folder, found):
    """Put something in the place of a file, and read it in every way; then put the file back."""
    path = file_of(folder, pattern)
    original = path.read_bytes()
    path.unlink()
    try:
        path.mkdir() if content is None else path.write_bytes(content)
        for read in TARGETS[pattern]:
            before = peak()
            error = tried(read, folder)
            found.add(pattern, content, error, peak() - before)
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(original)


def file_of(folder, pattern):
    return min(folder.glob(pattern))


def everywhere(folder):
    """Every file of a folder and beside it: nothing else may be there afterwards."""
    return sorted(folder.parent.rglob("*")), sorted(Path.cwd().iterdir())


def fuzz(folder, examples, number=0):
    """Read so many mutated files of a folder that `make` made, and look at what is said.

    The folder has nothing beside it but what this makes. `number` is that of the series.
    """
    found = Found()
    for pattern, reads in TARGETS.items():
        # the control: as they were written all of them are read
        errors = [tried(read, folder) for read in reads]
        assert errors == [None] * len(reads), f"{pattern}: {errors}"
    there = everywhere(folder)
    patterns = [name for name in TARGETS for _ in range(8 // SLOW.get(name, 1))]

    @seed(number)
    @settings(max_examples=examples, phases=[Phase.generate], **UNBOUND)
    @given(st.data())
    def one(data):
        pattern = data.draw(st.sampled_from(patterns))
        content = data.draw(mutated(file_of(folder, pattern)))
        found.counts[pattern] += 1
        read_as(content, pattern, folder, found)
        assert everywhere(folder) == there

    one()
    return found
