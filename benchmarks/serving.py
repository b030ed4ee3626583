"""The server under clients: start, memory, tokens per second, latencies with the load policy and without, a soak.

    python benchmarks/serving.py --checkpoint runs/converted
    python benchmarks/serving.py --checkpoint runs/converted --only soak --soak 30

Starts `main.py serve` itself. Clients ask again as soon as they are answered, greedily, each for `--tokens` tokens; a
share of the budgets is theirs by chance in the soak alone. Needs requirements-dev.txt (the openai client).
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2 as httpx
import openai

ROOT = Path(__file__).parent.parent
BUDGETS = ("1.0", "0.9", "0.8", "0.7", "0.6")
CLIENTS = 8
"""Of the soak."""
PARTS = ("memory", "clients", "load", "soak")
DENSE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    model(torch.ones(1, 8, dtype=torch.long))
print(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
"""


class Server:
    def __init__(self, options: argparse.Namespace, *more: str) -> None:
        line = [sys.executable, str(ROOT / "main.py"), "serve", "--checkpoint", str(options.checkpoint)]
        line += ["--name", "model", "--port", "0", "--budgets", *BUDGETS, "--threads", str(options.threads), *more]
        begun = time.monotonic()
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self.process.stdout is not None
        first = next(line for line in self.process.stdout if line.startswith("serving"))
        self.seconds = time.monotonic() - begun
        self.url = re.search(r"http://[^/]+", first)[0]
        # what it still says must not fill the pipe
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=600)

    def resident(self) -> float:
        """Its memory in MB."""
        return float(self.metric("process_resident_memory_bytes")) / 1e6

    def metric(self, name: str) -> str:
        text = httpx.get(f"{self.url}/metrics").text
        return next(line for line in text.splitlines() if line.startswith(name)).split()[-1]

    def ask(self, number: int, tokens: int, budget: str, **settings: object) -> tuple[str, int, str]:
        """One answer: the model that gave it, its tokens, its text."""
        prompt = f"{number}. Once upon a time, in a village by the river, there lived an old baker who"
        settings = {"max_tokens": tokens, "temperature": 0, "extra_body": {"budget": budget}} | settings
        answer = self.client.completions.create(model="model", prompt=prompt, **settings)
        return answer.model, answer.usage.completion_tokens, answer.choices[0].text


@contextmanager
def serving(options: argparse.Namespace, *more: str) -> Iterator[Server]:
    server = Server(options, *more)
    try:
        server.ask(0, 4, BUDGETS[0])
        yield server
    finally:
        server.process.terminate()
        assert server.process.wait(120) == 0, "it did not end well"


class Answered(NamedTuple):
    seconds: float
    model: str
    tokens: int
    first: bool
    """Of its client: all begin at once, which is no steady state."""


def busy(clients: int, seconds: float, ask: Callable[[int], tuple[str, int, str]]) -> tuple[list[Answered], float]:
    """The answers to all requests that began in time, the fastest first, and how long all of it took."""
    found: list[Answered] = []
    begun = time.monotonic()

    def client(number: int) -> None:
        first = True
        while time.monotonic() - begun < seconds:
            before = time.monotonic()
            model, tokens, _ = ask(number)
            found.append(Answered(time.monotonic() - before, model, tokens, first))
            first = False

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(found), time.monotonic() - begun


def speed(found: list[Answered], took: float) -> float:
    return sum(each.tokens for each in found) / took


def times(found: list[Answered]) -> list[float]:
    """Of all but the first ones."""
    return [each.seconds for each in found if not each.first]


def p95(latencies: list[float]) -> float:
    return latencies[min(len(latencies) - 1, int(0.95 * len(latencies)))]


def memory(options: argparse.Namespace) -> None:
    folder = options.checkpoint / "flextron" if (options.checkpoint / "flextron").is_dir() else options.checkpoint
    done = subprocess.run([sys.executable, "-c", DENSE, str(folder)], capture_output=True, text=True, check=True)
    with serving(options) as server:
        for budget in BUDGETS:
            server.ask(0, 4, budget)
        print(
            f"start: {server.seconds:.1f} s until it listens; memory: {server.resident():.0f} MB with {len(BUDGETS)} "
            f"budgets, one dense model in transformers {int(done.stdout) / 1e3:.0f} MB (both with Python and libraries)"
        )


def clients(options: argparse.Namespace) -> None:
    with serving(options) as server:
        for budget in (BUDGETS[0], BUDGETS[-1]):
            for count in (1, 2, 4, 8):
                found, took = busy(count, options.seconds, lambda i, b=budget: server.ask(i, options.tokens, b))
                median = statistics.median(times(found))
                print(f"budget {budget}, {count} clients: {speed(found, took):.1f} tokens/s, median {median:.2f} s")


def load(options: argparse.Namespace) -> None:
    told: dict[str, list[float]] = {}
    for name, more in {
        "as asked": (),
        f"under load {BUDGETS[-1]}": ("--load_budget", BUDGETS[-1], "--load_requests", str(options.clients // 2)),
    }.items():
        with serving(options, *more) as server:
            found, took = busy(
                options.clients, 2 * options.seconds, lambda i, s=server: s.ask(i, options.tokens, BUDGETS[0])
            )
        less = sum(each.model.endswith(BUDGETS[-1]) for each in found) / len(found)
        told[name] = times(found)
        print(
            f"{options.clients} clients ask for {BUDGETS[0]}, {name}: median {statistics.median(told[name]):.2f} s, "
            f"95 % within {p95(told[name]):.2f} s, {speed(found, took):.1f} tokens/s, "
            f"{less:.0%} of {len(found)} answered within {BUDGETS[-1]}"
        )
    if options.figure is not None:
        draw(told, options)


def draw(told: dict[str, list[float]], options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "serving"
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, found in told.items():
        shares = [(place + 1) / len(found) for place in range(len(found))]
        (line,) = axes.step([0, *found], [0, *shares], where="post", label=f"{name}: 95 % within {p95(found):.1f} s")
        axes.axvline(p95(found), color=line.get_color(), linewidth=0.8, linestyle=":")
    axes.set(xlabel="seconds to an answer", ylabel="share of requests", xlim=0, ylim=(0, 1.02))
    axes.set_title(f"{options.clients} clients, {options.tokens} tokens each", fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(options.figure, metadata={"Date": None} if options.figure.suffix == ".svg" else None)


def soak(options: argparse.Namespace) -> None:
    """All budgets at once, some clients gone before their answer; with --check, each text against the one alone."""
    draws = random.Random(0)
    lengths = (4, 16, 32)
    expected: dict[tuple[int, int, str], str] = {}
    mixed = 0

    def ask(number: int) -> tuple[str, int, str]:
        nonlocal mixed
        budget, tokens = draws.choice(BUDGETS), draws.choice(lengths)
        if draws.random() < 0.1:
            body = {"model": "model", "prompt": "Once", "max_tokens": 64, "stream": True, "budget": budget}
            with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=600) as stream:
                next(stream.iter_lines())
            return "", 1, ""
        # most bear nothing smaller, so that all budgets have their batches
        bears = {"budget": budget} | ({"least_budget": budget} if draws.random() < 0.7 else {})
        answer = server.ask(number, tokens, budget, extra_body=bears)
        if expected:
            mixed += answer[2] != expected[number, tokens, answer[0].partition("@")[2]]
        return answer

    more = ("--dtype", "float64") if options.check else ()
    with serving(options, "--load_budget", BUDGETS[-1], "--load_requests", "6", *more) as server:
        if options.check:
            asked = itertools.product(range(CLIENTS), lengths, BUDGETS)
            expected |= {each: server.ask(*each)[2] for each in asked}
        rounds = max(int(options.soak), 1)
        seen, total = [], 0
        for minute in range(rounds):
            found, _ = busy(CLIENTS, 60 * options.soak / rounds, ask)
            total += len(found)
            seen.append(server.resident())
            print(f"minute {minute + 1}: {total} requests, {seen[-1]:.0f} MB", flush=True)
        warm = seen[len(seen) // 3 :]
        print(f"memory over the last two thirds: {min(warm):.0f} to {max(warm):.0f} MB; no request failed")
        if options.check:
            print(f"{mixed} texts were not those of their budget alone")
            assert not mixed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each number of clients")
    parser.add_argument("--clients", type=int, default=12, help="under load")
    parser.add_argument("--figure", type=Path, help="where to draw latencies with the load policy and without")
    parser.add_argument("--soak", type=float, default=0.0, help="minutes")
    parser.add_argument("--check", action="store_true", help="of the soak: every text, in float64")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    options = parser.parse_args()
    for part in options.only:
        if part != "soak" or options.soak:
            globals()[part](options)


if __name__ == "__main__":
    main()
