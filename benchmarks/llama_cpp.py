"""A request to a GGUF file by llama.cpp: speed and memory, by a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

PROMPT, ANSWER = 256, 64
"""Tokens of the request."""
Found = dict[str, float]


def answer(file: str, threads: int) -> Found:
    """Tokens a second of prompt and answer (median of three requests), and the memory in MB that all of it took."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, threads
    params.cpuparams_batch.n_threads = threads
    params.warmup, params.fit_params = True, False
    # from here on the most that is resident is of what comes now, not of what was imported
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    server = xllamacpp.Server(params)
    found = []
    for turn in range(3):
        # another prompt each time, so that none is found in the cache
        ids = [100 + turn + 7 * place for place in range(PROMPT)]
        wanted = {"prompt": ids, "max_tokens": ANSWER, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
        given: Any = server.handle_completions(wanted)
        found.append((json.loads(given) if isinstance(given, str) else given)["timings"])
    speeds = {name: median(each[f"{name}_per_second"] for each in found) for name in ("prompt", "predicted")}
    return {**speeds, "memory_mb": resident("VmHWM") - before}


def resident(what: str) -> float:
    """Memory of this process by a name of Linux's, in MB."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def asked(file: Path, threads: int) -> Found:
    """What `answer` finds, in a new process."""
    command = [sys.executable, __file__, str(file), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("found ")]
    return json.loads(line.removeprefix("found "))


def seconds(found: Found) -> float:
    """Of the request."""
    return PROMPT / found["prompt"] + ANSWER / found["predicted"]


if __name__ == "__main__":
    print("found", json.dumps(answer(sys.argv[1], int(sys.argv[2]))), flush=True)
