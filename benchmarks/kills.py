"""A pipeline killed at random moments, and started again by the same command until it ends as if nobody had.

    OMP_NUM_THREADS=1 python benchmarks/kills.py --kills 40 --stops 10 --output runs/kills --check

A run is `python main.py pipeline` of the debug config, with fewer steps, from an empty cache: all stages, tokenising,
tables, folders and the report. Kills (SIGKILL) and requests to stop (SIGTERM) come at moments drawn over all of it, a
few to a run, by the seconds that it has computed (on a busy machine others pass); with two processes to one of them.
Afterwards every file of the run folder is compared byte by byte, but for TensorBoard's, of which every scalar is, and
for what says when a run was made. What is done stays in the folder of the output: the same command goes on.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.runs import logged

SHORTER = 4
"""By how much fewer steps a stage has than in the debug config."""
EACH = 6
"""Kills of one run at most."""
GONE = 120
"""Seconds within which no process of a killed run may be left."""
DATED = ("pipeline.json", "report.html", ".lock")
"""They say when they were made, how often the pipeline was called, and by which process."""
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def write_pipeline(path, processes, less=0):
    """The debug pipeline with fewer steps, for so many processes; the first stage may have some steps less."""
    pipeline = yaml.safe_load((ROOT / "configs/debug_pipeline.yaml").read_text())
    model = {"init_args": {"checkpoint": f"random:{ROOT / 'configs/models/tiny-llama'}"}}
    pipeline["stages"]["elastic"]["settings"]["model"] = model
    for stage in pipeline["stages"].values():
        stage["configs"] = [str(ROOT / "configs" / name) for name in stage["configs"]]
        settings = stage["settings"]
        for limit in ("max_steps", "val_check_interval", "max_epochs"):
            if limit in settings["trainer"]:
                settings["trainer"][limit] //= SHORTER
        if processes > 1:
            settings["trainer"] |= {"devices": processes, "strategy": "ddp"}
    pipeline["stages"]["elastic"]["settings"]["trainer"]["max_steps"] -= less
    path.write_text(yaml.safe_dump(pipeline | {"run_folder": "run"}, sort_keys=False))


class Campaign:
    """Runs with so many processes, each in a folder of its own, from which every path looks the same."""

    def __init__(self, output, processes, seed=0):
        self.folder = output / f"{processes}-processes"
        self.processes = processes
        self.folder.mkdir(parents=True, exist_ok=True)
        write_pipeline(self.folder / "pipeline.yaml", processes)
        write_pipeline(self.folder / "other.yaml", processes, less=1)
        self.random = lambda number: random.Random(f"{seed} {processes} {number}")
        self.kept = self.folder / "done.json"
        self.done = json.loads(self.kept.read_text()) if self.kept.is_file() else {"runs": []}

    def keep(self, **found):
        self.done |= found
        self.kept.write_text(json.dumps(self.done, indent=1))

    def start(self, name, config="pipeline.yaml"):
        place = self.folder / name
        place.mkdir(exist_ok=True)
        command = [sys.executable, str(ROOT / "main.py"), "pipeline", "-c", str(self.folder / config)]
        environment = ENVIRONMENT | {"FLEXTRON_CACHE": str(place / "cache")}
        with (place / "said.txt").open("a") as said:
            return subprocess.Popen(
                command, cwd=place, env=environment, stdout=said, stderr=said, start_new_session=True
            )

    def undisturbed(self, name, config="pipeline.yaml"):
        if f"{name} seconds" not in self.done:
            shutil.rmtree(self.folder / name, ignore_errors=True)
            before, process = computed(), self.start(name, config)
            code = process.wait()
            assert code == 0, (self.folder / name / "said.txt").read_text()[-2000:]
            self.keep(**{f"{name} seconds": computed() - before})
        return self.done[f"{name} seconds"]

    def disturbed(self, number, wanted):
        """One run, with kills as long as some are wanted; what came when, and how the run ended."""
        name, draw = f"run{number}", self.random(number)
        shutil.rmtree(self.folder / name, ignore_errors=True)
        seconds, kills, wrong = self.undisturbed("reference"), [], []
        while True:
            process = self.start(name)
            left = [each for each, count in wanted.items() for _ in range(count)]
            disturb = bool(left) and len(kills) < EACH
            moment = draw.uniform(0.02, 0.5) * seconds
            if not disturb or not reached(process, moment):
                code = process.wait()
            else:
                chosen = draw.choice(left)
                of = draw.choice(ranks_of(process))
                os.kill(of, getattr(signal, chosen))
                code = process.wait()
                wanted[chosen] -= 1
                left_over = ended(process.pid)
                kills.append({"signal": chosen, "after": round(moment, 1), "code": code})
                kills[-1] |= {"first": of == process.pid, "where": self.said(name)}
                print(f"{self.processes} processes, run {number}: {kills[-1]}", flush=True)
                if left_over:
                    wrong.append(f"kill {len(kills)} left processes behind: {left_over}")
                if not code:
                    break
                continue
            break
        if code:
            wrong.append(f"the last command ended with {code}: {self.said(name)}")
        if "Traceback" in (self.folder / name / "said.txt").read_text():
            wrong.append("a traceback")
        wrong += differing(self.folder / "reference/run", self.folder / name / "run")
        print(f"{self.processes} processes, run {number}: {wrong or 'as the undisturbed one'}", flush=True)
        self.keep(runs=[*self.done["runs"], {"kills": kills, "wrong": wrong}])
        if not wrong:
            shutil.rmtree(self.folder / name)

    def said(self, name):
        lines = [line.strip() for line in (self.folder / name / "said.txt").read_text().splitlines() if line.strip()]
        stage = next((line for line in reversed(lines) if line.startswith("stage ")), "before the first stage")
        return f"{stage}; {lines[-1][:160] if lines else ''}"

    def run(self, wanted):
        """Until so many signals of each kind have come."""
        wanted = Counter(wanted) - Counter(kill["signal"] for run in self.done["runs"] for kill in run["kills"])
        while wanted.total():
            self.disturbed(len(self.done["runs"]), wanted)
        self.undisturbed("again")
        self.undisturbed("other", "other.yaml")

    def result(self):
        reference = self.folder / "reference/run"
        return {
            "signals": dict(Counter(kill["signal"] for run in self.done["runs"] for kill in run["kills"])),
            "stages": dict(Counter(kill["where"].split(";")[0] for run in self.done["runs"] for kill in run["kills"])),
            "runs": len(self.done["runs"]),
            "wrong": [wrong for run in self.done["runs"] for wrong in run["wrong"]],
            "undisturbed twice": differing(reference, self.folder / "again/run"),
            "control: weights that a step less changes": [
                name for name in differing(reference, self.folder / "other/run") if name.endswith(".safetensors")
            ],
        }


def computed():
    """Seconds that processes have computed which were waited for, and those that they waited for."""
    used = os.times()
    return used.children_user + used.children_system


def reached(process, moment):
    """Wait until a session has computed for so long; false if it ends before."""
    tick = os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        used = 0
        for number in members(process.pid):
            with contextlib.suppress(OSError):
                stat = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
                used += sum(map(int, stat[11:15])) / tick
        if used >= moment:
            return True
        time.sleep(0.05)
    return False


def members(session):
    """Processes of a session that run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(int(stat.parent.name))
    return sorted(found)


def ranks_of(process):
    """Processes that run `main.py`, the first of them that which was started."""

    def is_rank(number):
        try:
            return b"main.py" in Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            return False

    return [process.pid, *(each for each in members(process.pid) if each != process.pid and is_rank(each))]


def ended(session):
    """What is left of a session after `GONE` seconds; it is then killed."""
    deadline = time.monotonic() + GONE
    while (left := members(session)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for each in left:
        os.kill(each, signal.SIGKILL)
    return left


def differing(reference, other):
    """Names of files that differ, but for dates."""

    def files(folder):
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return {name for name in names if "/tensorboard/" not in name and Path(name).name not in DATED}

    there, here = files(reference), files(other)
    found = [f"{name}: only in one" for name in sorted(there ^ here)]
    found += [name for name in sorted(there & here) if (reference / name).read_bytes() != (other / name).read_bytes()]
    for folder in sorted(reference.glob("*/tensorboard")):
        stage = folder.parent.name
        if not (other / stage).is_dir() or logged(reference / stage) != logged(other / stage):
            found.append(f"{stage}/tensorboard")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs, over all numbers of processes together")
    parser.add_argument("--stops", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/kills"))
    parser.add_argument("--check", action="store_true", help="exit 1 if a run ended elsewhere")
    options = parser.parse_args()
    found = {}
    for processes in options.processes:
        campaign, shares = Campaign(options.output.absolute(), processes), len(options.processes)
        campaign.run({"SIGKILL": options.kills // shares, "SIGTERM": options.stops // shares})
        found[f"{processes} processes"] = campaign.result()
        print(json.dumps(found[f"{processes} processes"], indent=1), flush=True)
    (options.output / "result.json").write_text(json.dumps(found, indent=1))
    good = all(not each["wrong"] + each["undisturbed twice"] and list(each.values())[-1] for each in found.values())
    return 1 if options.check and not good else 0


if __name__ == "__main__":
    sys.exit(main())
