"""`python main.py serve`: an OpenAI-compatible server in which every budget is a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flextron_lit.commands.options import CommandLine, place_of, refuse_below_one
from flextron_lit.costs.budget import HELP
from flextron_lit.generation.call import notes_told
from flextron_lit.model import FlextronModel
from flextron_lit.serving.load_policy import LoadPolicy
from flextron_lit.serving.offer import SEPARATOR, Offer, offer
from flextron_lit.serving.tokens import ends_of, lengths

if TYPE_CHECKING:
    from flextron_lit.serving.app import Rules

KEY = "FLEXTRON_API_KEY"
"""The environment variable that holds what clients must send; in none of the options, which other users can read."""
BUDGETS = ["1.0", "0.8", "0.6"]
NEEDED = ("starlette", "uvicorn", "prometheus_client")
HERE = ("127.0.0.1", "localhost", "::1")


def parser() -> CommandLine:
    """Of the command line."""
    made = CommandLine.on_checkpoint(command)
    text = f"What clients may choose from, each as the model NAME@BUDGET ({' '.join(BUDGETS)}). {HELP}"
    made.add_argument("--budgets", type=str, nargs="+", default=BUDGETS, metavar="BUDGET", help=text)
    made.add_argument("--name", type=str, help="What clients call the model; by default as its folder is called.")
    made.add_argument("--host", type=str, default="127.0.0.1", help="Where to listen; 0.0.0.0 is everywhere.")
    made.add_argument("--port", type=int, default=8000, help="0 takes one that is free.")
    made.add_argument("--slots", type=int, default=16, help="Requests that run at once, over all budgets.")
    made.add_argument("--waiting", type=int, default=64, help="Requests that wait for a slot; more are refused (429).")
    text = "Under load, requests of larger budgets are answered within this one, one of --budgets, and are told so."
    made.add_argument("--load_budget", type=str, help=text)
    text = "So many requests in the house, running and waiting, are load (as many as there are slots)."
    made.add_argument("--load_requests", type=int, help=text)
    text = "Longest prompt, in tokens; by default what the network reads at once."
    made.add_argument("--max_prompt_tokens", type=int, help=text)
    made.add_argument("--max_answer_tokens", type=int, default=512, help="Longest answer, in tokens.")
    made.add_argument("--max_body_bytes", type=int, default=2**20, help="Longest request.")
    text = "Seconds for what is in the house when the server is told to end (SIGTERM, Ctrl-C)."
    made.add_argument("--drain_seconds", type=int, default=60, help=text)
    made.add_argument("--threads", type=int, help="Threads on a CPU; by default as many as torch takes.")
    made.add_loading("float64")
    return made


def check(options: Any) -> None:
    """Refuse options that are out of range, or have no effect beside the others, and a server without its packages.

    Raises:
        ValueError: naming one.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install -r requirements-serve.txt")
    counts = ("slots", "waiting", "load_requests", "max_prompt_tokens", "max_answer_tokens", "max_body_bytes")
    refuse_below_one(options, *counts, "drain_seconds", "threads")
    if options.load_requests is not None and options.load_budget is None:
        raise ValueError("--load_requests has no effect without --load_budget")
    if SEPARATOR in (options.name or ""):
        raise ValueError(f"--name must be without {SEPARATOR}, behind which the budget stands, not {options.name!r}")
    if os.environ.get(KEY) == "":
        raise ValueError(f"{KEY} is empty, which no client can send; set it to a key, or unset it")


def rules(model: FlextronModel, offered: Offer, options: Any) -> Rules:
    """What a command line allows requests.

    Raises:
        ValueError: if the budget under load is not offered.
    """
    from flextron_lit.serving.app import Rules

    policy = LoadPolicy()
    if options.load_budget is not None:
        budget = offered.find(options.load_budget)
        if budget is None:
            raise ValueError(f"--load_budget must be one of --budgets, {', '.join(options.budgets)}")
        policy = LoadPolicy(budget, options.load_requests or options.slots)
    allowed = lengths(model, options.max_prompt_tokens, options.max_answer_tokens)
    return Rules(allowed, policy, options.max_body_bytes, os.environ.get(KEY))


def told(place: tuple[str, int], offered: Offer, model: FlextronModel, key: str | None) -> str:
    """What there is to say when clients may come."""
    host, port = place
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    chat = model.tokenizer.chat_template is not None
    asks = '"messages": [{"role": "user", "content": "Hello"}]' if chat else '"prompt": "Once upon a time"'
    path = "/v1/chat/completions" if chat else "/v1/completions"
    line = f"serving {', '.join(map(offered.model, offered.budgets))} at {url}/v1 (Ctrl-C ends it)"
    header = f' -H "Authorization: Bearer ${KEY}"' if key else ""
    body = f'{{"model": "{offered.model(offered.budgets[-1])}", "max_tokens": 50, {asks}}}'
    lines = [line, f"  curl {url}{path}{header} -H 'Content-Type: application/json' -d '{body}'"]
    if not chat:
        lines.append("note: there is no chat template, so /v1/chat/completions is refused")
    if key is None and host not in HERE:
        lines.append(f"note: whoever reaches {host} may ask; set {KEY} to a key that clients must send")
    return "\n".join(lines)


def name_of(folder: Path) -> str:
    """What a checkpoint's folder is called; of a run the run's."""
    whole = folder.absolute()
    return (whole.parent if whole.name == "flextron" else whole).name.replace(SEPARATOR, "-")


def command(args: Sequence[str]) -> None:
    """An OpenAI-compatible server in which every budget is a model, all from one set of weights.

    Example: main.py serve --checkpoint runs/quickstart/joint_tuning --budgets 1.0 0.8 0.6
    """
    options = parser().parse_args(list(args))
    check(options)
    from flextron_lit.serving import process
    from flextron_lit.serving.app import Service
    from flextron_lit.serving.engine import Engine

    folder, device = place_of(options)
    place = process.bound(options.host, options.port)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model = FlextronModel.from_pretrained(folder, dtype=getattr(torch, options.dtype), device=device)
    with notes_told(lambda line: print(line, flush=True)):
        offered = offer(model, options.name or name_of(folder), options.budgets, options.latency)
    allowed = rules(model, offered, options)
    engine = Engine(model, ends_of(model)[0], slots=options.slots, places=options.waiting)
    service = Service(model, offered, engine, allowed)
    line = told((options.host, place.getsockname()[1]), offered, model, allowed.key)
    process.run(service.app, engine, place, lambda: print(line, flush=True), options.drain_seconds)
    print("ended: every request in the house was answered", flush=True)
